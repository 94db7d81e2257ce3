from mollm.system.tables import aligned, html_table


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


def test_a_table_for_a_notebook_has_every_cell_as_text():
    shown = html_table(("", "n"), [("<theme>",), ("a & b", "6")], caption="<b>")
    assert "<theme>" not in shown
    assert '<th colspan="2" style="text-align:left">&lt;theme&gt;</th>' in shown
    assert '<td style="text-align:left">a &amp; b</td>' in shown
    assert '<td style="text-align:right">6</td>' in shown
    assert shown.endswith("<div>&lt;b&gt;</div>")
