"""Teachers: everything that can say what a model predicts for packed rows.

One narrow interface (`base.Teacher`), many places where the model may live. Each name here is a value of
the table that `open_teacher` reads; see docs/adding-a-teacher.md.
"""
