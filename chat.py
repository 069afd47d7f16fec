def run(models):
    pass
