# For NVIDIA GPUs. The host needs the driver and the NVIDIA container toolkit; CUDA comes with jax[cuda12].
#   docker build -t instaflow_jax .
#   docker run --gpus all -v "$PWD/runs:/instaflow_jax/runs" instaflow_jax --config=configs/reflow.py
# The web page: docker run --gpus all -p 127.0.0.1:7860:7860 … --config=configs/serve.py --config.host=0.0.0.0
# `docker stop --time=300` gives training the time to save; with the same volume, the next container resumes.
FROM python:3.12-slim

WORKDIR /instaflow_jax
COPY setup.py README.md LICENSE ./
COPY instaflow_jax ./instaflow_jax
RUN pip install --no-cache-dir -e .[gpu,train,serve]
COPY configs ./configs

# Compiled programs go beside the runs, so that they outlive the container.
ENV JAX_COMPILATION_CACHE_DIR=/instaflow_jax/runs/compiled
VOLUME /instaflow_jax/runs
ENTRYPOINT ["python", "-m", "instaflow_jax.main"]
