"""What a traced program is made of."""

from jaxldm.models.cost import _jaxprs_in


def equations(jaxpr):
    """All equations of a program, those of the functions that it calls among them."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in _jaxprs_in(equation.params.values()):
            yield from equations(inner)


def products(jaxpr):
    """The matrix products of a program, each by the shapes of its inputs and result."""
    return sorted(
        tuple(variable.aval.shape for variable in (*equation.invars, *equation.outvars))
        for equation in equations(jaxpr)
        if equation.primitive.name == "dot_general"
    )
