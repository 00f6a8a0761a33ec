#!/usr/bin/env bash
# The tests that compute on a GPU (tests/gpu): CUDA's where the environment has onnxruntime-gpu, WebGPU's everywhere. Where
# there is no GPU, the processor plays one: SwiftShader, a Vulkan driver that Debian's chromium brings.
set -euo pipefail
cd "$(dirname "$0")/.."

packages=.cache/gpu
# Installed anew only when the lock has changed.
if [ ! "$packages/.installed" -nt tests/gpu/requirements.txt ]; then
    rm -rf "$packages"
    .venv/bin/python -m pip --disable-pip-version-check --no-input -qq install --no-deps --require-hashes \
        --target "$packages" -r tests/gpu/requirements.txt
    touch "$packages/.installed"
fi
vulkan=$(ldconfig -p | grep -F libvulkan.so.1 || true)
if [ -z "$vulkan" ]; then
    .ci/need-package.sh libvulkan1 - "WebGPU"
fi
if ! compgen -G "/dev/dri/renderD*" >/dev/null; then
    .ci/need-package.sh chromium chromium "WebGPU on a processor"
    export VK_ICD_FILENAMES=/usr/lib/chromium/vk_swiftshader_icd.json ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER=1
    echo "test: no GPU in /dev/dri, WebGPU computes on SwiftShader"
fi
PYTHONPATH=$packages .venv/bin/python -m pytest -rs tests/gpu "$@"
