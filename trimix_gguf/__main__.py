from trimix_gguf.cli import main

main()
