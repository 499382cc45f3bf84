from dist_obdsd.cli import program

program()
