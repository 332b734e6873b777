"""`python -m affmae_cli`, for torchrun and for installations without the console script."""

from affmae_cli.main import main

if __name__ == "__main__":
    main()
