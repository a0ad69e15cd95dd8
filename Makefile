# The five commands that people use.
.PHONY: install test slow lint bench

install:
	python -m pip install -e ".[test]"

test:
	python -m pytest

slow:
	python -m pytest -m slow

lint:
	ruff check . && ruff format --check . && mypy && lint-imports

bench:
	python -m benchmarks
