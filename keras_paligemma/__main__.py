"""The command line: `python -m keras_paligemma`."""

from keras_paligemma.cli import main

if __name__ == "__main__":
    main()
