"""llama.cpp's own server, in the wheel xllamacpp: `python llama_cpp_server.py GGUF NAME PORT`."""

import sys
import threading

import xllamacpp

params = xllamacpp.CommonParams()
params.model.path, name, port = sys.argv[1:]
params.model_alias, params.hostnames, params.port = {name}, ["127.0.0.1"], int(port)
params.n_parallel, params.n_ctx = 4, 4 * 256
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(params)
threading.Event().wait()
