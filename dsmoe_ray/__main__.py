"""``python -m dsmoe_ray``: the same commands as the installed ``dsmoe`` script."""

from dsmoe_ray.cli.main import main

if __name__ == "__main__":
    main()
