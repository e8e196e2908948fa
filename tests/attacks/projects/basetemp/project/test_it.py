def test_it(tmp_path_factory):
    @RAN@
    @IN_THE_GUEST@ or tmp_path_factory.getbasetemp()
