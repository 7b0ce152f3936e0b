# mhc_jax for NVIDIA GPUs with a driver for CUDA 13 (580 or newer): docker build -t mhc_jax .
#   docker run --gpus all -v "$PWD/runs:/runs" mhc_jax train --config laptop --workdir /runs/laptop
# CUDA itself comes with the packages. --build-arg EXTRAS=cuda12,cloud for older drivers (525).
FROM python:3.12-slim
ARG EXTRAS=cuda13,cloud
WORKDIR /opt/mhc_jax
RUN pip install --no-cache-dir uv
COPY requirements/3.12.txt requirements/
RUN uv pip install --system --no-cache -r requirements/3.12.txt
COPY . .
RUN uv pip install --system --no-cache -c requirements/3.12.txt ".[$EXTRAS]"
WORKDIR /runs
ENTRYPOINT ["mhc"]
