"""What tests stand on: private servers, child processes, a TCP proxy, waiting with a deadline."""
