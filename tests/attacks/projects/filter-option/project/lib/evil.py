@TRAP@


class Category(UserWarning):
    pass
