"""A domain of one's own: a dot is to be pushed onto a target. Laid out as those of dm_control."""
from dm_control import mujoco
from dm_control.rl import control
from dm_control.suite import base

XML = """
<mujoco>
  <option timestep="0.02"/>
  <worldbody>
    <light pos="0 0 2"/>
    <camera name="above" pos="0 0 1.2"/>
    <geom name="floor" type="plane" size="0.5 0.5 0.1"/>
    <geom name="target" type="sphere" size="0.03" pos="0.2 0.1 0.03" contype="0" conaffinity="0"/>
    <body name="dot" pos="0 0 0.05">
      <joint name="x" type="slide" axis="1 0 0" damping="1" range="-0.4 0.4" limited="true"/>
      <joint name="y" type="slide" axis="0 1 0" damping="1" range="-0.4 0.4" limited="true"/>
      <geom name="dot" type="sphere" size="0.05" mass="0.3"/>
    </body>
  </worldbody>
  <actuator>
    <motor joint="x" ctrlrange="-1 1" ctrllimited="true"/>
    <motor joint="y" ctrlrange="-1 1" ctrllimited="true"/>
  </actuator>
</mujoco>
"""


class Push(base.Task):
    def initialize_episode(self, physics):
        physics.data.qpos[:] = self.random.uniform(-0.4, 0.4, 2)  # its seed names the episode
        super().initialize_episode(physics)

    def get_observation(self, physics):
        return {'position': physics.data.qpos.copy(), 'velocity': physics.data.qvel.copy()}

    def get_reward(self, physics):
        off = physics.named.data.geom_xpos['dot', :2] - physics.named.data.geom_xpos['target', :2]
        return float((off ** 2).sum() < 0.05 ** 2)


def push(random=None):
    return control.Environment(mujoco.Physics.from_xml_string(XML), Push(random=random),
                               time_limit=20)


SUITE = {'push': push}  # task -> function
