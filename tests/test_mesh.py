"""Ranks have coordinates, and stand in groups along the axes."""

import pytest

from helpers.engine.mesh import AXES, Coordinate, Mesh


def test_a_mesh_of_eight_is_as_worked_out_by_hand():
    mesh = Mesh(data=2, tensor=2, pipeline=2)
    assert [mesh.coordinate(rank) for rank in range(4)] == [
        Coordinate(0, 0, 0),
        Coordinate(0, 1, 0),
        Coordinate(1, 0, 0),
        Coordinate(1, 1, 0),
    ]
    assert mesh.members(3, "tensor") == (2, 3)
    assert mesh.members(3, "data") == (1, 3)
    assert mesh.members(3, "pipeline") == (3, 7)
    assert mesh.members(3, "world") == tuple(range(8))


@pytest.mark.parametrize("shape", [(1, 1, 1), (4, 1, 1), (1, 3, 1), (2, 3, 4), (3, 1, 2)])
def test_number_and_coordinate_are_each_others_inverse(shape):
    mesh = Mesh(*shape)
    coordinates = [mesh.coordinate(rank) for rank in range(mesh.size)]
    assert len(set(coordinates)) == mesh.size == shape[0] * shape[1] * shape[2]
    assert [mesh.index(**place._asdict()) for place in coordinates] == list(range(mesh.size))


@pytest.mark.parametrize("shape", [(2, 3, 4), (3, 1, 2)])
def test_the_groups_of_an_axis_hold_every_rank_once(shape):
    mesh = Mesh(*shape)
    for axis in AXES:
        groups = {mesh.members(rank, axis) for rank in range(mesh.size)}
        assert sorted(rank for group in groups for rank in group) == list(range(mesh.size))
        assert {len(group) for group in groups} == {getattr(mesh, axis)}
        assert all(rank in mesh.members(rank, axis) for rank in range(mesh.size))


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "2", True, None])
def test_a_size_that_is_no_whole_number_is_refused(wrong):
    with pytest.raises(ValueError, match="data must be a whole number from 1 up"):
        Mesh(data=wrong)


def test_what_is_outside_the_mesh_is_refused():
    mesh = Mesh(data=2)
    with pytest.raises(ValueError, match="no rank 2: this mesh has ranks 0 to 1"):
        mesh.coordinate(2)
    with pytest.raises(ValueError, match="data coordinate 2 is outside"):
        mesh.index(data=2)
    with pytest.raises(ValueError, match="no axis 'model'"):
        mesh.members(0, "model")
