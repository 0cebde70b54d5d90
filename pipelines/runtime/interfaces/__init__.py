"""What stages receive and report: frozen, validated models. JSON is how they are stored.

    inputs.py        what determines the outcome of each kind of stage
    results.py       what each kind of stage reports
    plan_result.py   what a plan reports
    kinds.py         kind of a stage → its module, inputs and result

Imports no torch.
"""
