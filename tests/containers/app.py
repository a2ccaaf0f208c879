"""The worker's app: pytest-celery writes the task modules' imports, name and settings into it."""

import os
from typing import Any

from celery import Celery

from tests.containers.shop import Shop

imports = None
app = Celery("celery_test_app")
config: Any
config = None
if config:
    app.config_from_object(config)
shop = Shop(app, os.environ["SHOP_DATABASE_URL"])
