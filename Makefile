# `make test` and `make demo` set everything up on a fresh machine and then do their job.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: test demo lint format clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(READY)

test: lint
	$(BIN)/pytest -n 2 --dist loadfile

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The whole job on the pocket Llama 4: what it is, quantize it with its evidence, does it fit, is it
# whole, verdict.
demo: $(READY)
	rm -rf demo-out
	$(BIN)/llama4q inspect pocket
	$(BIN)/llama4q quantize pocket demo-out/pocket-int4 --recipe int4 --length 1024 \
		--eval-windows 32 --eval-length 1024 --lengths 512,1024,2048 --prompts 4
	$(BIN)/llama4q fit demo-out/pocket-int4 --gpu h100-80gb
	$(BIN)/llama4q verify demo-out/pocket-int4 --against pocket
	$(BIN)/llama4q check demo-out/pocket-int4/report.json --html demo-out/report.html
	@echo "Look at demo-out/report.html"

clean:
	rm -rf .venv demo-out dist .mypy_cache .ruff_cache .pytest_cache
