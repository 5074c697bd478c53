# fastwm in a container: on the CPU by default, with CUDA by two build arguments (docs/install.md).
ARG BASE=ubuntu:24.04
FROM ${BASE}

# PyTorch first: pip would otherwise fetch the build with CUDA for a CPU image.
ARG TORCH="torch --index-url https://download.pytorch.org/whl/cpu"
# More packages, as in "crafter,memorymaze": crafter, memorymaze, mario, atari, dmc, ...
ARG EXTRAS=""
# GPU architectures of the CUDA kernels; ignored without nvcc.
ARG TORCH_CUDA_ARCH_LIST="8.0;8.6;8.9;9.0+PTX"

ENV DEBIAN_FRONTEND=noninteractive PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 \
    PATH=/opt/venv/bin:$PATH TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST}

# A compiler for the kernels, Mesa for MuJoCo's pictures, Qt for Procgen.
RUN apt-get update && apt-get install -y --no-install-recommends \
        python3 python3-dev python3-venv g++ git ca-certificates \
        libgl1 libegl1 libgl1-mesa-dri libosmesa6 libqt5gui5t64 libqt5widgets5t64 \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv \
    && pip install --upgrade pip

RUN pip install ${TORCH}

WORKDIR /src
COPY . .
RUN pip install ".${EXTRAS:+[$EXTRAS]}" && python -m fastwm.doctor

# Runs are written to the mounted folder; the checkout must not be the current one.
WORKDIR /workspace
ENTRYPOINT ["python", "-m"]
CMD ["fastwm.doctor"]
