"""`python -m rectified_spaattn`, which is what launchers of several processes start."""

from .cli import main

if __name__ == "__main__":
    main()
