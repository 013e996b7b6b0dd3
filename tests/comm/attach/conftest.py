from tests.laws.conftest import pool

__all__ = ["pool"]
