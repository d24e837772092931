"""What runs where: llama.cpp, files, memory, devices, threads and locks."""
