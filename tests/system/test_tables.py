from mollm.system.tables import aligned


def test_texts_begin_and_numbers_end_in_one_column():
    assert aligned([("", "n", "share"), ("Forget", "6", "17%"), ("Kept", "12")]) == [
        "         n  share",
        "Forget   6    17%",
        "Kept    12",
    ]


def test_several_columns_may_be_texts():
    assert aligned([("a", "in use"), ("long", "no")], left=2) == ["a     in use", "long  no"]


def test_no_row_is_no_line():
    assert aligned([]) == []
