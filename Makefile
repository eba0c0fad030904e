PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# DeepSpeed must see torch while it builds, and must not compile its operators: none of them is used on a CPU.
PIP := DS_BUILD_OPS=0 $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: venv demo test test-slow lint clean

venv: $(VENV)/installed

$(VENV)/installed: setup.cfg constraints.txt
	@echo "Installing into $(VENV) (a few minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch numpy setuptools wheel packaging
	$(PIP) --no-build-isolation deepspeed
	$(PIP) --no-build-isolation -e '.[s3,test,lint]'
	@touch $@

demo: venv
	$(BIN)/foleyscale demo

test: venv
	$(BIN)/python -m pytest -n 2

test-slow: venv
	$(BIN)/python -m pytest -m slow

lint: venv
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) build *.egg-info
