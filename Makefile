# Each target is what a person would type. PYTHON may name another interpreter (3.11 or newer) for the environment.
PYTHON ?= python3
BIN := .venv/bin
DEMO ?= demo
PARTS ?= 240
# Tests and demo use clusters of their own on this machine: nothing of theirs listens beyond loopback, nothing of the user's is joined.
OWN := env -u RAY_ADDRESS -u MLFLOW_TRACKING_URI

.PHONY: setup demo test test-slow test-all bench lint clean

setup: .venv/.installed  ## install into .venv

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

demo: setup  ## generated parts -> prepare -> embed -> tune -> register -> infer, in $(DEMO)/
	$(BIN)/python -m cad_models.alignment.examples_on_disk parts --count $(PARTS) --out $(DEMO)/parts
	$(OWN) $(BIN)/python rayjobs/prepare.py --task alignment --source $(DEMO)/parts --dataset $(DEMO)/dataset --preview $(DEMO)/parts.png
	$(OWN) $(BIN)/python rayjobs/embed.py --task alignment --dataset $(DEMO)/dataset
	$(OWN) $(BIN)/python rayjobs/tune.py --task alignment --dataset $(DEMO)/dataset --output $(DEMO)/searches --tracking.folder $(DEMO)/mlflow \
	    --search.num-samples 4 --search.scheduler none --schedule.num-epochs 8 --ensemble-size 3
	$(BIN)/python -m cad_models.alignment.examples_on_disk queries --dataset $(DEMO)/dataset --parts $(DEMO)/parts --out $(DEMO)
	$(OWN) $(BIN)/python rayjobs/infer.py --task alignment --model models:/cad-alignment@champion --tracking.folder $(DEMO)/mlflow \
	    --queries $(DEMO)/queries --gallery $(DEMO)/gallery --output $(DEMO)/submission.csv
	@echo "look at $(DEMO)/submission.html; the tracked runs: $(BIN)/mlflow ui --backend-store-uri sqlite:///$(DEMO)/mlflow/mlflow.db"

test: setup  ## the tests, without the slow ones; several files at once, each on one thread
	$(OWN) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" --numprocesses logical --maxprocesses 4 --dist loadfile

test-slow: setup  ## kills, restarts, whole jobs; two files at once, since most of their time is waiting
	$(OWN) $(BIN)/python -m pytest -m slow --durations 10 --numprocesses 2 --dist loadfile

test-all: test test-slow

bench: setup  ## benchmarks/: all rows, at most 30 minutes on 2 quiet cores
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(OWN) $(BIN)/python -m benchmarks

lint: setup
	$(BIN)/ruff check .

clean:  ## what demo and runs made; not .venv
	rm -rf $(DEMO) outputs
