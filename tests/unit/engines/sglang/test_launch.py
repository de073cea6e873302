"""How a stock SGLang server is started as an engine."""

import importlib.util
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.config_argv import config_of

from slime.engines.sglang.launch import launch
from slime.engines.sglang.receiver import PATH
from slime.errors import ConfigError
