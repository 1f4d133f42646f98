"""llama.cpp's own server as a process, from the wheel xllamacpp: llama_server.py MODEL.gguf PORT

Run by the Python of build/llama; it imports nothing of ours.
"""

import signal
import sys

import xllamacpp  # type: ignore[import-not-found]

CONTEXT_TOKENS = 1024

if __name__ == "__main__":
    options = xllamacpp.CommonParams()
    options.model.path = sys.argv[1]
    options.model_alias = {"smollm2"}
    options.hostnames = ["127.0.0.1"]
    options.port = int(sys.argv[2])
    options.n_ctx = CONTEXT_TOKENS
    options.n_parallel = 1
    options.cpuparams.n_threads = 1  # several wait for each other on a busy machine
    options.warmup = options.ui = False
    server = xllamacpp.Server(options)
    signal.pause()
