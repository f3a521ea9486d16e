# Every target makes the virtual environment it needs: Python >= 3.10 and make are enough.

PYTHON ?= python3
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help venv test sweep report resources figures lint clean

help:
	@echo "make sweep      time ours against torch.nn into results/ (without a GPU: the CPU path, and numerics)"
	@echo "make report     figures and an HTML page of results/, into results/report/"
	@echo "make test       the whole test suite, no GPU needed"
	@echo "make resources  compile every kernel for several GPUs, no GPU needed: registers, spills, shared memory"
	@echo "make figures    draw the figures of docs/ and renew the tables that are counted, no GPU needed"
	@echo "make lint       ruff check and ruff format --check"
	@echo "make clean      remove environments, caches and results"
	@echo "ARGS is handed on by sweep, report and resources: make sweep ARGS='--cells lstm --hidden 512'; PYTHON is the interpreter to start from"

# What the environment is made from. It is made anew when this changes, and when making it did not finish.
MADE_FROM = { $(PYTHON) -VV; pwd; cat constraints.txt pyproject.toml; }

venv:
	@$(MADE_FROM) | cmp -s - $(VENV)/made-from || { set -e; \
		rm -rf $(VENV); \
		$(PYTHON) -m venv $(VENV); \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'; \
		$(MADE_FROM) > $(VENV)/made-from; }

# Interpreted kernels and the rest first; then what needs a process without Triton's interpreter.
test: venv
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 -q
	TRITON_INTERPRET=0 $(BIN)/python -m pytest -n 2 -q

sweep: venv
	$(BIN)/python -m lstm_triton.perf sweep --out results/ $(ARGS)

report: venv
	$(BIN)/python -m lstm_triton.perf report results/ --out results/report $(ARGS)

resources: venv
	$(BIN)/python -m lstm_triton.perf resources --out perf/results/resources $(ARGS)
	$(BIN)/python -m lstm_triton.perf resources --variants --out perf/results/resources

figures: venv
	TRITON_INTERPRET=0 $(BIN)/python docs/figures/vanishing.py
	TRITON_INTERPRET=0 $(BIN)/python docs/figures/schedules.py
	TRITON_INTERPRET=0 $(BIN)/python docs/figures/ladder.py

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) .venv-triton build dist results *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
