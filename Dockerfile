# What runs on every machine of a TPU slice (docs/launching.md). The versions are those of constraints.txt.
FROM python:3.12-slim

ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /lfm_jax

# First what changes seldom: a changed source file does not install the libraries anew.
COPY setup.cfg pyproject.toml constraints.txt README.md LICENSE ./
RUN pip install -c constraints.txt -e '.[tpu]'

COPY lfm_jax lfm_jax
COPY data_pipelines data_pipelines
COPY experiments experiments
COPY configs configs
COPY run.py ./

# No shell and no entry point: a launched command is `python run.py ...`, and gets the signals itself.
CMD ["python", "run.py", "--list"]
