"""A rehearsal of accidents: the shop at work, its processes killed on the way, and the books after.

`plan` draws what will happen; `cast` and `fleet` run the processes, `strikes` kills them, `customer`
places the orders; `rehearsal` is the course of events; `backlog` and `census` count, `outcome` and
`report` tell. `quickstart` and `chaos` are the two commands.
"""
