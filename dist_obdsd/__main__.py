from dist_obdsd.cli.main import program

program()
