"""What kind each solver is: the one place where the tests that hold for every solver ask for exceptions.

A new solver that draws noise, remembers steps or has another name's step goes in here, and nowhere else.
"""

# Their samples have no place of their own to end, whatever the network.
NOISY = {"ddpm", "euler_ancestral", "dpm2_ancestral", "dpmpp_2m_sde", "dpmpp_3m_sde", "sit_sde"} | {
    "dpm_sde",
    "dpmpp_sde",
    "sa_solver",
    "predictor_corrector",
}
# They assume a network that was distilled, and draw noise.
DISTILLED = {"lcm", "tcd"}
# They remember past steps, so a run that is cut and continued starts again in first order.
MULTISTEP = {"lms", "pndm", "deis", "dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde", "dpmpp_3m_sde", "unipc"} | {
    "dpm_2m",
    "dpm_3m",
    "dpm_sde",
    "ipndm",
    "sa_solver",
    "dpmpp_3s",  # in threes
    "dpm_3s",
}
# Two names of one step.
SAME_AS = {"euler": "ddim", "dpmpp_1s": "ddim"}
