# The scripts in a container, for CPU and GPU alike: PyPI's torch serves both.
#
#   docker build -t quintet .
#   docker run --rm --gpus all --shm-size 8g -v "$PWD/data:/quintet/data" -v "$PWD/output:/quintet/output" quintet \
#       torchrun --nproc_per_node=8 Pretrain.py --config configs/Pretrain/simla.yaml
#
# On an image that has torch, which is kept:  --build-arg BASE=pytorch/pytorch:2.9.1-cuda12.8-cudnn9-runtime
# Smaller, without CUDA:                      --build-arg TORCH="torch torchvision --index-url ADDRESS"
#                                             (the address of PyTorch's CPU builds, from its installation page)
ARG BASE=python:3.12-slim
FROM ${BASE}
ARG TORCH=""
# Versions are those of the base image's Debian, whichever BASE is.
# hadolint ignore=DL3008
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends git wordnet-base \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /quintet
COPY requirements.txt ./
# TORCH is the builder's choice; requirements.txt has the ranges.
# hadolint ignore=DL3013
RUN if [ -n "$TORCH" ]; then pip install --no-cache-dir $TORCH; fi \
    && pip install --no-cache-dir -r requirements.txt
COPY . ./
ENV OMP_NUM_THREADS=1
CMD ["python", "Pretrain.py", "--help"]
