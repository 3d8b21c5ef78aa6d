# NVIDIA GPUs; the host needs its driver and the NVIDIA container toolkit, CUDA itself comes with jax[cuda12].
#   docker build -t instaflow_jax .
#   docker run --gpus all -v "$PWD/runs:/instaflow_jax/runs" instaflow_jax --config=configs/reflow.py
# The web demo listens inside: docker run --gpus all -p 127.0.0.1:7860:7860 … --config=configs/serve.py --config.host=0.0.0.0
# `docker stop --time=300` gives training the time to save; started again with the same volume it resumes.
FROM python:3.12-slim

WORKDIR /instaflow_jax
COPY setup.py README.md LICENSE ./
COPY instaflow_jax ./instaflow_jax
RUN pip install --no-cache-dir -e .[gpu,serve]
COPY configs ./configs

# Compiled programs lie beside the runs, so that they outlive the container.
ENV JAX_COMPILATION_CACHE_DIR=/instaflow_jax/runs/compiled
VOLUME /instaflow_jax/runs
ENTRYPOINT ["python", "-m", "instaflow_jax.main"]
