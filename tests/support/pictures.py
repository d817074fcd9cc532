"""Reads figures for the tests of the pictures."""


def image(figure, axis=0):
    """Returns the values of the figure's image, a masked array [rows, columns]."""
    return figure.axes[axis].images[0].get_array()


def tick_labels(axis):
    """Returns (labels of the rows, of the columns)."""
    return tuple([label.get_text() for label in labels] for labels in (axis.get_yticklabels(), axis.get_xticklabels()))
