"""Lets the tests import the programs from the folder above, and names the marker of the slow ones."""
import sys
from pathlib import Path

from hypothesis import settings

settings.register_profile("busy machine", deadline=None)                          # a slow example is not a wrong one
settings.load_profile("busy machine")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes more than a few seconds; leave it out with -m 'not slow'")
    config.addinivalue_line("markers", "long: takes minutes or measures time; run only by -m long")


def pytest_collection_modifyitems(config, items):
    if "long" not in config.getoption("-m"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("long")])
        items[:] = [item for item in items if not item.get_closest_marker("long")]
    items.sort(key=lambda item: not item.get_closest_marker("slow"))              # or the last one would run alone
