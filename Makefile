# make test                                the tests
# make demo TASK=reacher_hard BUDGET=full  expert -> videos -> translator -> imitator
# make demo TASK=walker_walk TURNS=2       and again, with the first imitator's own play
# make bench                               how fast it is, and how good the shipped experts are:
#                                          rewrites experts/README.md and demo/expert/
# make faults                              what happens when things go wrong
# make lint                                ruff
# PYTHON=/path/to/python3.12 names the interpreter that .venv is made with.

TASK ?= reacher_hard
BUDGET ?= full

# What a budget buys, as overrides of each script, the same for every task. With TURNS=2 a first
# imitator films MORE_PLAY episodes of its own play, from which a second one learns as well.
TURNS ?= 1
DEMOS ?= 300
PLAY ?= $(if $(filter smoke,$(BUDGET)),8,300)
MORE_PLAY ?= $(if $(filter smoke,$(BUDGET)),8,1000)
EXPERT_full      = num_train_frames=300_000
VIDEOS_full      = num_train=$(DEMOS) num_valid=30 num_play=$(PLAY) \
    $(if $(SHIPPED_TRANSLATOR),num_contexts=2 num_play_valid=0,num_contexts=4 num_play_valid=30)
TRANSLATOR_full  = num_train_steps=1500 code.num_steps=3000
IMITATOR_full    = num_train_frames=5_000 snapshot_every_frames=1_000
EXPERT_smoke     = num_train_frames=6_000
VIDEOS_smoke     = num_train=8 num_valid=4 num_play=$(PLAY) num_play_valid=4
TRANSLATOR_smoke = num_train_steps=20 code.num_steps=20
IMITATOR_smoke   = num_train_frames=2_000 num_eval_episodes=4 num_pretrain_updates=100

ifeq ($(EXPERT_$(BUDGET)),)
$(error BUDGET=$(BUDGET) is neither full nor smoke)
endif

PY = .venv/bin/python

.PHONY: .venv test lint bench faults demo
.DELETE_ON_ERROR:

# Two processes keep two cores busy: threads, also software OpenGL's, would be in their way.
test: .venv
	OMP_NUM_THREADS=1 LP_NUM_THREADS=0 $(PY) -m pytest -n 2 --dist loadfile

lint: .venv
	.venv/bin/ruff check .

bench: .venv
	$(PY) benchmarks/bench.py
	$(PY) tools/evaluate.py

faults: .venv
	$(PY) benchmarks/faults.py

# ---------------------------------------------------------------------------------------- set-up

.venv: .venv/.installed

# The stamp makes pip run again when the pins change, and only then.
.venv/.installed: pyproject.toml
	@test -x $(PY) && exit 0; \
	for python in $(or $(PYTHON),python3.12 python3.11 python3 python); do \
	    $$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' \
	        2>/dev/null && exec $$python -m venv .venv; \
	done; \
	echo "error: this needs Python 3.11 or 3.12, and $(or $(PYTHON),python3) is neither:" \
	    "install one of them, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; \
	exit 2
	$(PY) -m pip install --disable-pip-version-check -e '.[dev]'
	@touch $@

# ------------------------------------------------------------------------------------------ demo

# Fixed run folders, so that the steps find each other and a second `make demo` goes on where the
# first was stopped. Shipped weights spare their step.
RUN = demo_$(TASK)_$(BUDGET)
SHIPPED_EXPERT = $(wildcard experts/$(TASK).pt)
SHIPPED_TRANSLATOR = $(wildcard ct/$(TASK).pt)
EXPERT = $(or $(SHIPPED_EXPERT),exp_local/$(RUN)/snapshot.pt)
ALL_PLAY = num_play=$(shell expr $(PLAY) + $(MORE_PLAY))
AC = $(PY) train_ac.py task=$(TASK) translator=$(TRANSLATOR) data_dir=videos/$(RUN)
TRANSLATOR = $(or $(SHIPPED_TRANSLATOR),ct_local/$(RUN)/best.pt)

demo: .venv
	$(if $(SHIPPED_EXPERT),@echo 'expert: $(EXPERT) is shipped',\
	    $(PY) train.py task=$(TASK) obs=states hydra.run.dir=exp_local/$(RUN) $(EXPERT_$(BUDGET)))
	$(PY) generate_expert_video.py task=$(TASK) expert=$(EXPERT) out_dir=videos/$(RUN) \
	    $(VIDEOS_$(BUDGET))
	$(if $(SHIPPED_TRANSLATOR),@echo 'translator: $(TRANSLATOR) is shipped',\
	    $(PY) train_ct.py task=$(TASK) data_dir=videos/$(RUN) hydra.run.dir=ct_local/$(RUN) \
	    $(TRANSLATOR_$(BUDGET)))
	$(if $(filter 2,$(TURNS)),\
	    $(AC) hydra.run.dir=ac_local/$(RUN)_first $(IMITATOR_$(BUDGET)) num_play=$(PLAY) && \
	    $(PY) generate_expert_video.py task=$(TASK) expert=$(EXPERT) out_dir=videos/$(RUN) \
	        $(VIDEOS_$(BUDGET)) $(ALL_PLAY) translator=$(TRANSLATOR) \
	        player=ac_local/$(RUN)_first/snapshot.pt)
	$(AC) hydra.run.dir=ac_local/$(RUN) $(IMITATOR_$(BUDGET)) \
	    $(if $(filter 2,$(TURNS)),$(ALL_PLAY))
