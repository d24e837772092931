# llama-cpp-python forces llama.cpp's common library on, in the cache, and does not use it: its
# 30 slow files are skipped by a variable of the same name, which goes before the cache's.
set(LLAMA_BUILD_COMMON OFF)
