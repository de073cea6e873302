# slime with SGLang on a stock CUDA image:  docker build -t slime .
#   docker run --gpus all --ipc=host --ulimit memlock=-1 -it slime
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates git make python3.12-dev python3.12-venv \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/slime
COPY . .
ENV UV_NO_CACHE=1 PIP_NO_CACHE_DIR=1
RUN make setup-gpu PYTHON=/usr/bin/python3.12
ENV PATH=/opt/slime/.venv/bin:$PATH
CMD ["bash"]
