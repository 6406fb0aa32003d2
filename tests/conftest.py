"""Strictness for every test: no silent rank promotion, warnings are errors (pyproject.toml), shapes
and types checked at run time in `lib`.
"""

from pathlib import Path

import jax
import pytest

from lib.settings import use_compilation_cache


jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_disable_most_optimizations", True)  # compiling is most of the time
use_compilation_cache(Path(__file__).parent.parent / "artifacts" / "cache")


# of the files, by CPU seconds: they start first, or one core would wait for the other at the end
LONGEST = ("test_pipeline", "test_expert", "test_studies", "test_methods", "test_surrogate")


def pytest_collection_modifyitems(items):
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="module", autouse=True)
def clear_programs():
    """Forget a module's compiled programs: each maps memory, and a process that reaches the
    system's limit of 65,530 mappings crashes.
    """
    yield
    jax.clear_caches()
