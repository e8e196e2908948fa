def test_below():
    @RAN@
