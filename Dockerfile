# The image of launch/kubernetes.yaml, launch/trainjob.yaml and launch/pytorchjob.yaml. From a checkout:
#
#   docker build --tag registry.example.com/dist-obdsd .
#   docker run --gpus all --shm-size 8g registry.example.com/dist-obdsd dist-obdsd doctor
#
# PyTorch's wheels bring CUDA's libraries along; the base image tells the container runtime to hand the GPUs in.
FROM nvidia/cuda:13.0.2-base-ubuntu24.04

# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends git openssh-client pdsh python3 python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv \
    && useradd --uid 10001 --create-home trainer
ENV PATH=/opt/venv/bin:$PATH

WORKDIR /workspace
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY dist_obdsd dist_obdsd
COPY shards shards
RUN pip install --no-cache-dir --constraint constraints.txt '.[all]'
COPY configs configs
COPY launch launch
USER 10001
CMD ["dist-obdsd", "doctor"]
