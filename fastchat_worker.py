def check_exposure(s):
    pass
