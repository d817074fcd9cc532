"""What the tests of the pictures read from a figure."""


def image(figure, axis=0):
    """The values of its picture, a masked array [rows, columns]."""
    return figure.axes[axis].images[0].get_array()


def tick_labels(axis):
    """(labels of the rows, of the columns)."""
    return tuple([label.get_text() for label in labels] for labels in (axis.get_yticklabels(), axis.get_xticklabels()))
