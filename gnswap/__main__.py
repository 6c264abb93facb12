"""`python -m gnswap` is `gnswap`."""

from gnswap._cli import main

if __name__ == "__main__":
    main()
