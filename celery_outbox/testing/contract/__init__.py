"""The contract of a store and its dialect: tests for a database server or a dialect of your own.

    pytest --pyargs celery_outbox.testing.contract --outbox-database-url postgresql+psycopg://...

runs them on an empty database. So does a test module that says

    from celery_outbox.testing.contract import *

where the fixture `outbox_contract_database` can be overridden: with another `Database`, or several. No
test's name is used twice, and so all of them fit into one module.
"""

from celery_outbox.testing.contract.administration import *
from celery_outbox.testing.contract.database import *
from celery_outbox.testing.contract.fast_path import *
from celery_outbox.testing.contract.incoming import *
from celery_outbox.testing.contract.inserting import *
from celery_outbox.testing.contract.local_queues import *
from celery_outbox.testing.contract.ordering import *
from celery_outbox.testing.contract.outgoing import *
from celery_outbox.testing.contract.relays import *
from celery_outbox.testing.contract.runs import *
from celery_outbox.testing.contract.schema import *
from celery_outbox.testing.contract.waiting import *
