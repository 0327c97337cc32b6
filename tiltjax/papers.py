"""Where methods and kernels come from: the papers that docstrings and records name, as BibTeX.

A record of `tiltjax.train.methods` says its paper in words, a kernel under "References"; both name a paper by its arXiv
number, or by author and year where there is none. `PAPERS` has what a bibliography needs beside that.
"""

import ast
import dataclasses
import functools
import pathlib
import re
import unicodedata

__all__ = ["PAPERS", "Paper", "citation"]

_TILTJAX = """@software{tiltjax,
  title = {tiltjax: alignment as an exponential tilt, in JAX},
  author = {{The tiltjax authors}},
  year = {2026},
  license = {Apache-2.0}
}"""
_SMALL_WORDS = frozenset(("a", "an", "from", "in", "is", "lets", "of", "on", "the", "to", "towards"))
_ARXIV_ID = re.compile(r"\barXiv:([\w.-]+/\d{7}|\d{4}\.\d{4,5})\b")


@dataclasses.dataclass(frozen=True)
class Paper:
    """A work that can be cited.

    Attributes:
      key: Its name in a bibliography, "rafailov2023direct".
      title: As its newest version has it.
      authors: "Given Family" or "Family, Given"; all of them up to eight, else six and "others".
      year: Of the first version on arXiv, or of the publication.
      arxiv: Number, empty for a paper without one.
      venue: Where it appeared, or its address; empty for a paper on arXiv.
    """

    key: str
    title: str
    authors: tuple[str, ...]
    year: int
    arxiv: str = ""
    venue: str = ""

    @property
    def family(self) -> str:
        """The first author's family name."""
        return _family(self.authors[0])

    def bibtex(self) -> str:
        """The entry of a bibliography; braces keep the capitals of the title."""
        fields = {
            "title": f"{{{self.title}}}",
            "author": " and ".join(self.authors),
            "year": str(self.year),
            "eprint": self.arxiv,
            "archivePrefix": "arXiv" if self.arxiv else "",
            "url": f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else "",
            "howpublished": self.venue,
        }
        if self.venue.startswith("http"):
            fields |= {"url": self.venue, "howpublished": ""}
        lines = [f"  {name} = {{{text}}}".replace("&", r"\&") for name, text in fields.items() if text]
        return f"@misc{{{self.key},\n" + ",\n".join(lines) + "\n}"


def _family(author: str) -> str:
    return author.partition(",")[0] if "," in author else author.rpartition(" ")[2]


def _paper(title: str, authors: str, year: int, *, arxiv: str = "", venue: str = "") -> Paper:
    names = tuple(authors.split("; "))
    words = re.findall(r"[a-z0-9]+", title.lower().replace("'", ""))
    first = next(word for word in words if word not in _SMALL_WORDS)
    family = unicodedata.normalize("NFKD", _family(names[0])).encode("ascii", "ignore").decode().lower()
    return Paper(re.sub(r"\W", "", family) + f"{year}{first}", title, names, year, arxiv, venue)


def _arxiv(number: str, title: str, authors: str) -> Paper:
    """A paper whose year is the first one of its number: of the first version, not of the conference."""
    return _paper(title, authors, 2000 + int(number.rpartition("/")[2][:2]), arxiv=number)


# fmt: off
_ON_ARXIV = (
    _arxiv("1406.2572", "Identifying and attacking the saddle point problem in high-dimensional non-convex "
           "optimization",
           "Yann Dauphin; Razvan Pascanu; Caglar Gulcehre; Kyunghyun Cho; Surya Ganguli; Yoshua Bengio"),
    _arxiv("1502.06362", "Contextual Dueling Bandits",
           "Miroslav Dudík; Katja Hofmann; Robert E. Schapire; Aleksandrs Slivkins; Masrour Zoghi"),
    _arxiv("1506.02438", "High-Dimensional Continuous Control Using Generalized Advantage Estimation",
           "John Schulman; Philipp Moritz; Sergey Levine; Michael Jordan; Pieter Abbeel"),
    _arxiv("1507.02646", "Pareto Smoothed Importance Sampling",
           "Aki Vehtari; Daniel Simpson; Andrew Gelman; Yuling Yao; Jonah Gabry"),
    _arxiv("1510.03055", "A Diversity-Promoting Objective Function for Neural Conversation Models",
           "Jiwei Li; Michel Galley; Chris Brockett; Jianfeng Gao; Bill Dolan"),
    _arxiv("1707.06347", "Proximal Policy Optimization Algorithms",
           "John Schulman; Filip Wolski; Prafulla Dhariwal; Alec Radford; Oleg Klimov"),
    _arxiv("1802.01886", "Texygen: A Benchmarking Platform for Text Generation Models",
           "Yaoming Zhu; Sidi Lu; Lei Zheng; Jiaxian Guo; Weinan Zhang; Jun Wang; Yong Yu"),
    _arxiv("1804.08771", "A Call for Clarity in Reporting BLEU Scores", "Matt Post"),
    _arxiv("1805.04833", "Hierarchical Neural Story Generation", "Angela Fan; Mike Lewis; Yann Dauphin"),
    _arxiv("1904.09751", "The Curious Case of Neural Text Degeneration",
           "Ari Holtzman; Jan Buys; Li Du; Maxwell Forbes; Yejin Choi"),
    _arxiv("1910.00177", "Advantage-Weighted Regression: Simple and Scalable Off-Policy Reinforcement Learning",
           "Xue Bin Peng; Aviral Kumar; Grace Zhang; Sergey Levine"),
    _arxiv("1912.09729", "Mastering Complex Control in MOBA Games with Deep Reinforcement Learning",
           "Deheng Ye; Zhao Liu; Mingfei Sun; Bei Shi; Peilin Zhao; Hao Wu; others"),
    _arxiv("2005.09814", "Mirror Descent Policy Optimization",
           "Manan Tomar; Lior Shani; Yonathan Efroni; Mohammad Ghavamzadeh"),
    _arxiv("2006.11239", "Denoising Diffusion Probabilistic Models", "Jonathan Ho; Ajay Jain; Pieter Abbeel"),
    _arxiv("2009.01325", "Learning to summarize from human feedback",
           "Nisan Stiennon; Long Ouyang; Jeff Wu; Daniel M. Ziegler; Ryan Lowe; Chelsea Voss; others"),
    _arxiv("2010.02502", "Denoising Diffusion Implicit Models", "Jiaming Song; Chenlin Meng; Stefano Ermon"),
    _arxiv("2011.13456", "Score-Based Generative Modeling through Stochastic Differential Equations",
           "Yang Song; Jascha Sohl-Dickstein; Diederik P. Kingma; Abhishek Kumar; Stefano Ermon; Ben Poole"),
    _arxiv("2102.09672", "Improved Denoising Diffusion Probabilistic Models", "Alex Nichol; Prafulla Dhariwal"),
    _arxiv("2104.09864", "RoFormer: Enhanced Transformer with Rotary Position Embedding",
           "Jianlin Su; Yu Lu; Shengfeng Pan; Ahmed Murtadha; Bo Wen; Yunfeng Liu"),
    _arxiv("2105.05233", "Diffusion Models Beat GANs on Image Synthesis", "Prafulla Dhariwal; Alex Nichol"),
    _arxiv("2106.09685", "LoRA: Low-Rank Adaptation of Large Language Models",
           "Edward J. Hu; Yelong Shen; Phillip Wallis; Zeyuan Allen-Zhu; Yuanzhi Li; Shean Wang; Lu Wang; Weizhu Chen"),
    _arxiv("2107.03374", "Evaluating Large Language Models Trained on Code",
           "Mark Chen; Jerry Tworek; Heewoo Jun; Qiming Yuan; Henrique Ponde de Oliveira Pinto; Jared Kaplan; others"),
    _arxiv("2110.14168", "Training Verifiers to Solve Math Word Problems",
           "Karl Cobbe; Vineet Kosaraju; Mohammad Bavarian; Mark Chen; Heewoo Jun; Lukasz Kaiser; others"),
    _arxiv("2112.09332", "WebGPT: Browser-assisted question-answering with human feedback",
           "Reiichiro Nakano; Jacob Hilton; Suchir Balaji; Jeff Wu; Long Ouyang; Christina Kim; others"),
    _arxiv("2202.00512", "Progressive Distillation for Fast Sampling of Diffusion Models", "Tim Salimans; Jonathan Ho"),
    _arxiv("2203.02155", "Training language models to follow instructions with human feedback",
           "Long Ouyang; Jeff Wu; Xu Jiang; Diogo Almeida; Carroll L. Wainwright; Pamela Mishkin; others"),
    _arxiv("2206.00364", "Elucidating the Design Space of Diffusion-Based Generative Models",
           "Tero Karras; Miika Aittala; Timo Aila; Samuli Laine"),
    _arxiv("2206.05825", "A Unified Approach to Reinforcement Learning, Quantal Response Equilibria, and Two-Player "
           "Zero-Sum Games",
           "Samuel Sokota; Ryan D'Orazio; J. Zico Kolter; Nicolas Loizou; Marc Lanctot; Ioannis Mitliagkas; Noam "
           "Brown; Christian Kroer"),
    _arxiv("2207.12598", "Classifier-Free Diffusion Guidance", "Jonathan Ho; Tim Salimans"),
    _arxiv("2210.10760", "Scaling Laws for Reward Model Overoptimization", "Leo Gao; John Schulman; Jacob Hilton"),
    _arxiv("2212.09748", "Scalable Diffusion Models with Transformers", "William Peebles; Saining Xie"),
    _arxiv("2302.09664", "Semantic Uncertainty: Linguistic Invariances for Uncertainty Estimation in Natural Language "
           "Generation",
           "Lorenz Kuhn; Yarin Gal; Sebastian Farquhar"),
    _arxiv("2302.12192", "Aligning Text-to-Image Models using Human Feedback",
           "Kimin Lee; Hao Liu; Moonkyung Ryu; Olivia Watkins; Yuqing Du; Craig Boutilier; others"),
    _arxiv("2304.06767", "RAFT: Reward rAnked FineTuning for Generative Foundation Model Alignment",
           "Hanze Dong; Wei Xiong; Deepanshu Goyal; Yihan Zhang; Winnie Chow; Rui Pan; others"),
    _arxiv("2305.10425", "SLiC-HF: Sequence Likelihood Calibration with Human Feedback",
           "Yao Zhao; Rishabh Joshi; Tianqi Liu; Misha Khalman; Mohammad Saleh; Peter J. Liu"),
    _arxiv("2305.13301", "Training Diffusion Models with Reinforcement Learning",
           "Kevin Black; Michael Janner; Yilun Du; Ilya Kostrikov; Sergey Levine"),
    _arxiv("2305.15363", "Inverse Preference Learning: Preference-based RL without a Reward Function",
           "Joey Hejna; Dorsa Sadigh"),
    _arxiv("2305.16381", "DPOK: Reinforcement Learning for Fine-tuning Text-to-Image Diffusion Models",
           "Ying Fan; Olivia Watkins; Yuqing Du; Hao Liu; Moonkyung Ryu; Craig Boutilier; others"),
    _arxiv("2305.18290", "Direct Preference Optimization: Your Language Model is Secretly a Reward Model",
           "Rafael Rafailov; Archit Sharma; Eric Mitchell; Stefano Ermon; Christopher D. Manning; Chelsea Finn"),
    _arxiv("2305.20050", "Let's Verify Step by Step",
           "Hunter Lightman; Vineet Kosaraju; Yura Burda; Harri Edwards; Bowen Baker; Teddy Lee; others"),
    _arxiv("2306.17775", "Practical and Asymptotically Exact Conditional Sampling in Diffusion Models",
           "Luhuan Wu; Brian L. Trippe; Christian A. Naesseth; David M. Blei; John P. Cunningham"),
    _arxiv("2307.08691", "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning", "Tri Dao"),
    _arxiv("2307.09288", "Llama 2: Open Foundation and Fine-Tuned Chat Models",
           "Hugo Touvron; Louis Martin; Kevin Stone; Peter Albert; Amjad Almahairi; Yasmine Babaei; others"),
    _arxiv("2309.00267", "RLAIF vs. RLHF: Scaling Reinforcement Learning from Human Feedback with AI Feedback",
           "Harrison Lee; Samrat Phatale; Hassan Mansoor; Thomas Mesnard; Johan Ferret; Kellie Lu; others"),
    _arxiv("2309.06657", "Statistical Rejection Sampling Improves Preference Optimization",
           "Tianqi Liu; Yao Zhao; Rishabh Joshi; Misha Khalman; Mohammad Saleh; Peter J. Liu; Jialu Liu"),
    _arxiv("2309.16240", "Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence "
           "Constraints",
           "Chaoqi Wang; Yibo Jiang; Chenghao Yang; Han Liu; Yuxin Chen"),
    _arxiv("2310.10505", "ReMax: A Simple, Effective, and Efficient Reinforcement Learning Method for Aligning Large "
           "Language Models",
           "Ziniu Li; Tian Xu; Yushun Zhang; Zhihang Lin; Yang Yu; Ruoyu Sun; Zhi-Quan Luo"),
    _arxiv("2310.12036", "A General Theoretical Paradigm to Understand Learning from Human Preferences",
           "Mohammad Gheshlaghi Azar; Mark Rowland; Bilal Piot; Daniel Guo; Daniele Calandriello; Michal Valko; Rémi "
           "Munos"),
    _arxiv("2310.12773", "Safe RLHF: Safe Reinforcement Learning from Human Feedback",
           "Josef Dai; Xuehai Pan; Ruiyang Sun; Jiaming Ji; Xinbo Xu; Mickel Liu; Yizhou Wang; Yaodong Yang"),
    _arxiv("2310.17022", "Controlled Decoding from Language Models",
           "Sidharth Mudgal; Jong Lee; Harish Ganapathy; YaGuang Li; Tao Wang; Yanping Huang; others"),
    _arxiv("2312.00886", "Nash Learning from Human Feedback",
           "Rémi Munos; Michal Valko; Daniele Calandriello; Mohammad Gheshlaghi Azar; Mark Rowland; Zhaohan Daniel "
           "Guo; others"),
    _arxiv("2312.06585", "Beyond Human Data: Scaling Self-Training for Problem-Solving with Language Models",
           "Avi Singh; John D. Co-Reyes; Rishabh Agarwal; Ankesh Anand; Piyush Patil; Xavier Garcia; others"),
    _arxiv("2312.08935", "Math-Shepherd: Verify and Reinforce LLMs Step-by-step without Human Annotations",
           "Peiyi Wang; Lei Li; Zhihong Shao; R. X. Xu; Damai Dai; Yifei Li; others"),
    _arxiv("2312.09244", "Helping or Herding? Reward Model Ensembles Mitigate but do not Eliminate Reward Hacking",
           "Jacob Eisenstein; Chirag Nagpal; Alekh Agarwal; Ahmad Beirami; Alex D'Amour; DJ Dvijotham; others"),
    _arxiv("2401.01335", "Self-Play Fine-Tuning Converts Weak Language Models to Strong Language Models",
           "Zixiang Chen; Yihe Deng; Huizhuo Yuan; Kaixuan Ji; Quanquan Gu"),
    _arxiv("2401.01879", "Theoretical guarantees on the best-of-n alignment policy",
           "Ahmad Beirami; Alekh Agarwal; Jonathan Berant; Alexander D'Amour; Jacob Eisenstein; Chirag Nagpal; "
           "Ananda Theertha Suresh"),
    _arxiv("2401.04056", "A Minimaximalist Approach to Reinforcement Learning from Human Feedback",
           "Gokul Swamy; Christoph Dann; Rahul Kidambi; Zhiwei Steven Wu; Alekh Agarwal"),
    _arxiv("2401.08417", "Contrastive Preference Optimization: Pushing the Boundaries of LLM Performance in Machine "
           "Translation",
           "Haoran Xu; Amr Sharaf; Yunmo Chen; Weiting Tan; Lingfeng Shen; Van Durme, Benjamin; Kenton Murray; Young "
           "Jin Kim"),
    _arxiv("2401.10020", "Self-Rewarding Language Models",
           "Weizhe Yuan; Richard Yuanzhe Pang; Kyunghyun Cho; Xian Li; Sainbayar Sukhbaatar; Jing Xu; Jason Weston"),
    _arxiv("2402.00856", "Towards Efficient Exact Optimization of Language Model Alignment",
           "Haozhe Ji; Cheng Lu; Yilin Niu; Pei Ke; Hongning Wang; Jun Zhu; Jie Tang; Minlie Huang"),
    _arxiv("2402.01306", "KTO: Model Alignment as Prospect Theoretic Optimization",
           "Kawin Ethayarajh; Winnie Xu; Niklas Muennighoff; Dan Jurafsky; Douwe Kiela"),
    _arxiv("2402.03300", "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
           "Zhihong Shao; Peiyi Wang; Qihao Zhu; Runxin Xu; Junxiao Song; Xiao Bi; others"),
    _arxiv("2402.05369", "Noise Contrastive Alignment of Language Models with Explicit Rewards",
           "Huayu Chen; Guande He; Lifan Yuan; Ganqu Cui; Hang Su; Jun Zhu"),
    _arxiv("2402.13228", "Smaug: Fixing Failure Modes of Preference Optimisation with DPO-Positive",
           "Arka Pal; Deep Karkhanis; Samuel Dooley; Manley Roberts; Siddartha Naidu; Colin White"),
    _arxiv("2402.14740", "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in "
           "LLMs",
           "Arash Ahmadian; Chris Cremer; Matthias Gallé; Marzieh Fadaee; Julia Kreutzer; Olivier Pietquin; Ahmet "
           "Üstün; Sara Hooker"),
    _arxiv("2403.00409", "Provably Robust DPO: Aligning Language Models with Noisy Feedback",
           "Sayak Ray Chowdhury; Anush Kini; Nagarajan Natarajan"),
    _arxiv("2403.07691", "ORPO: Monolithic Preference Optimization without Reference Model",
           "Jiwoo Hong; Noah Lee; James Thorne"),
    _arxiv("2404.03715", "Direct Nash Optimization: Teaching Language Models to Self-Improve with General Preferences",
           "Corby Rosset; Ching-An Cheng; Arindam Mitra; Michael Santacroce; Ahmed Awadallah; Tengyang Xie"),
    _arxiv("2404.04626", "Towards Analyzing and Understanding the Limitations of DPO: A Theoretical Perspective",
           "Duanyu Feng; Bowen Qin; Chen Huang; Zheng Zhang; Wenqiang Lei"),
    _arxiv("2404.04656", "Binary Classifier Optimization for Large Language Model Alignment",
           "Seungjae Jung; Gunsoo Han; Daniel Wontae Nam; Kyoung-Woon On"),
    _arxiv("2404.09656", "Learn Your Reference Model for Real Good Alignment",
           "Alexey Gorbatovski; Boris Shaposhnikov; Alexey Malakhov; Nikita Surnachev; Yaroslav Aksenov; Ian "
           "Maksimov; Nikita Balagansky; Daniil Gavrilov"),
    _arxiv("2404.12358", "From r to Q*: Your Language Model is Secretly a Q-Function",
           "Rafael Rafailov; Joey Hejna; Ryan Park; Chelsea Finn"),
    _arxiv("2404.16767", "REBEL: Reinforcement Learning via Regressing Relative Rewards",
           "Zhaolin Gao; Jonathan D. Chang; Wenhao Zhan; Owen Oertell; Gokul Swamy; Kianté Brantley; others"),
    _arxiv("2404.17546", "Probabilistic Inference in Language Models via Twisted Sequential Monte Carlo",
           "Stephen Zhao; Rob Brekelmans; Alireza Makhzani; Roger Grosse"),
    _arxiv("2404.19733", "Iterative Reasoning Preference Optimization",
           "Richard Yuanzhe Pang; Weizhe Yuan; Kyunghyun Cho; He He; Sainbayar Sukhbaatar; Jason Weston"),
    _arxiv("2405.00675", "Self-Play Preference Optimization for Language Model Alignment",
           "Yue Wu; Zhiqing Sun; Huizhuo Yuan; Kaixuan Ji; Yiming Yang; Quanquan Gu"),
    _arxiv("2405.14734", "SimPO: Simple Preference Optimization with a Reference-Free Reward",
           "Yu Meng; Mengzhou Xia; Danqi Chen"),
    _arxiv("2405.21046", "Exploratory Preference Optimization: Harnessing Implicit Q*-Approximation for "
           "Sample-Efficient RLHF",
           "Tengyang Xie; Dylan J. Foster; Akshay Krishnamurthy; Corby Rosset; Ahmed Awadallah; Alexander Rakhlin"),
    _arxiv("2406.05882", "Distributional Preference Alignment of LLMs via Optimal Transport",
           "Igor Melnyk; Youssef Mroueh; Brian Belgodere; Mattia Rigotti; Apoorva Nitsure; Mikhail Yurochkin; others"),
    _arxiv("2406.08414", "Discovering Preference Optimization Algorithms with and for Large Language Models",
           "Chris Lu; Samuel Holt; Claudio Fanconi; Alex J. Chan; Jakob Foerster; Mihaela van der Schaar; Robert "
           "Tjarko Lange"),
    _arxiv("2406.11827", "WPO: Enhancing RLHF with Weighted Preference Optimization",
           "Wenxuan Zhou; Ravi Agrawal; Shujian Zhang; Sathish Reddy Indurthi; Sanqiang Zhao; Kaiqiang Song; Silei "
           "Xu; Chenguang Zhu"),
    _arxiv("2407.00617", "Iterative Nash Policy Optimization: Aligning LLMs with General Preferences via No-Regret "
           "Learning",
           "Yuheng Zhang; Dian Yu; Baolin Peng; Linfeng Song; Ye Tian; Mingyue Huo; others"),
    _arxiv("2407.01082", "Turning Up the Heat: Min-p Sampling for Creative and Coherent LLM Outputs",
           "Minh Nhat Nguyen; Andrew Baker; Clement Neo; Allen Roush; Andreas Kirsch; Ravid Shwartz-Ziv"),
    _arxiv("2407.13399", "Correcting the Mythos of KL-Regularization: Direct Alignment without Overoptimization via "
           "Chi-Squared Preference Optimization",
           "Audrey Huang; Wenhao Zhan; Tengyang Xie; Jason D. Lee; Wen Sun; Akshay Krishnamurthy; Dylan J. Foster"),
    _arxiv("2407.14503", "Catastrophic Goodhart: regularizing RLHF with KL divergence does not mitigate heavy-tailed "
           "reward misspecification",
           "Thomas Kwa; Drake Thomas; Adrià Garriga-Alonso"),
    _arxiv("2407.21075", "Apple Intelligence Foundation Language Models",
           "Tom Gunter; Zirui Wang; Chong Wang; Ruoming Pang; Andy Narayanan; Aonan Zhang; others"),
    _arxiv("2408.03314", "Scaling LLM Test-Time Compute Optimally can be More Effective than Scaling Model Parameters",
           "Charlie Snell; Jaehoon Lee; Kelvin Xu; Aviral Kumar"),
    _arxiv("2408.06266", "Anchored Preference Optimization and Contrastive Revisions: Addressing Underspecification "
           "in Alignment",
           "Karel D'Oosterlinck; Winnie Xu; Chris Develder; Thomas Demeester; Amanpreet Singh; Christopher Potts; "
           "Douwe Kiela; Shikib Mehri"),
    _arxiv("2409.06411", "Length Desensitization in Direct Preference Optimization",
           "Wei Liu; Yang Bai; Chengcheng Han; Rongxiang Weng; Jun Xu; Xuezhi Cao; Jingang Wang; Xunliang Cai"),
    _arxiv("2410.02197", "Beyond Bradley-Terry Models: A General Preference Model for Language Model Alignment",
           "Yifan Zhang; Ge Zhang; Yue Wu; Kangping Xu; Quanquan Gu"),
    _arxiv("2410.16714", "Magnetic Preference Optimization: Achieving Last-iterate Convergence for Language Model "
           "Alignment",
           "Mingzhi Wang; Chengdong Ma; Qizhi Chen; Linjian Meng; Yang Han; Jiancong Xiao; others"),
    _arxiv("2410.23123", "On Memorization of Large Language Models in Logical Reasoning",
           "Chulin Xie; Yangsibo Huang; Chiyuan Zhang; Da Yu; Xinyun Chen; Bill Yuchen Lin; others"),
    _arxiv("2412.01981", "Free Process Rewards without Process Labels",
           "Lifan Yuan; Wendi Li; Huayu Chen; Ganqu Cui; Ning Ding; Kaiyan Zhang; others"),
    _arxiv("2501.03262", "REINFORCE++: Stabilizing Critic-Free Policy Optimization with Global Advantage Normalization",
           "Jian Hu; Jason Klein Liu; Haotian Xu; Wei Shen"),
    _arxiv("2501.04519", "rStar-Math: Small LLMs Can Master Math Reasoning with Self-Evolved Deep Thinking",
           "Xinyu Guan; Li Lyna Zhang; Yifei Liu; Ning Shang; Youran Sun; Yi Zhu; Fan Yang; Mao Yang"),
    _arxiv("2501.06848", "A General Framework for Inference-time Scaling and Steering of Diffusion Models",
           "Raghav Singhal; Zachary Horvitz; Ryan Teehan; Mengye Ren; Zhou Yu; Kathleen McKeown; Rajesh Ranganath"),
    _arxiv("2502.01456", "Process Reinforcement through Implicit Rewards",
           "Ganqu Cui; Lifan Yuan; Zefan Wang; Hanbin Wang; Wendi Li; Bingxiang He; others"),
    _arxiv("2502.03373", "Demystifying Long Chain-of-Thought Reasoning in LLMs",
           "Edward Yeo; Yuxuan Tong; Morry Niu; Graham Neubig; Xiang Yue"),
    _arxiv("2502.11026", "RLHF in an SFT Way: From Optimal Solution to Reward-Weighted Alignment",
           "Yuhao Du; Zhuo Li; Pengyu Cheng; Zhihong Chen; Yuejiao Xie; Xiang Wan; Anningzhe Gao"),
    _arxiv("2503.01067", "All Roads Lead to Likelihood: The Value of Reinforcement Learning in Fine-Tuning",
           "Gokul Swamy; Sanjiban Choudhury; Wen Sun; Zhiwei Steven Wu; J. Andrew Bagnell"),
    _arxiv("2503.04697", "L1: Controlling How Long A Reasoning Model Thinks With Reinforcement Learning",
           "Pranjal Aggarwal; Sean Welleck"),
    _arxiv("2503.06639", "Reinforcement Learning with Verifiable Rewards: GRPO's Effective Loss, Dynamics, and "
           "Success Amplification",
           "Youssef Mroueh"),
    _arxiv("2503.14476", "DAPO: An Open-Source LLM Reinforcement Learning System at Scale",
           "Qiying Yu; Zheng Zhang; Ruofei Zhu; Yufeng Yuan; Xiaochen Zuo; Yu Yue; others"),
    _arxiv("2503.20783", "Understanding R1-Zero-Like Training: A Critical Perspective",
           "Zichen Liu; Changyu Chen; Wenjun Li; Penghui Qi; Tianyu Pang; Chao Du; Wee Sun Lee; Min Lin"),
    _arxiv("2503.21878", "Is Best-of-N the Best of Them? Coverage, Scaling, and Optimality in Inference-Time Alignment",
           "Audrey Huang; Adam Block; Qinghua Liu; Nan Jiang; Akshay Krishnamurthy; Dylan J. Foster"),
    _arxiv("2504.05812", "Right Question is Already Half the Answer: Fully Unsupervised LLM Reasoning Incentivization",
           "Qingyang Zhang; Haitao Wu; Changqing Zhang; Peilin Zhao; Yatao Bian"),
    _arxiv("2504.16084", "TTRL: Test-Time Reinforcement Learning",
           "Yuxin Zuo; Kaiyan Zhang; Li Sheng; Shang Qu; Ganqu Cui; Xuekai Zhu; others"),
    _arxiv("2505.03156", "Soft Best-of-n Sampling for Model Alignment",
           "Claudio Mayrink Verdun; Alex Oesterling; Himabindu Lakkaraju; Flavio P. Calmon"),
    _arxiv("2505.15134", "The Unreasonable Effectiveness of Entropy Minimization in LLM Reasoning",
           "Shivam Agarwal; Zimin Zhang; Lifan Yuan; Jiawei Han; Hao Peng"),
    _arxiv("2505.19590", "Learning to Reason without External Rewards",
           "Xuandong Zhao; Zhewei Kang; Aosong Feng; Sergey Levine; Dawn Song"),
    _arxiv("2505.19770", "Understanding the Performance Gap in Preference Learning: A Dichotomy of RLHF and DPO",
           "Ruizhe Shi; Minhak Song; Runlong Zhou; Zihan Zhang; Maryam Fazel; Simon S. Du"),
    _arxiv("2505.22660", "Maximizing Confidence Alone Improves Reasoning",
           "Mihir Prabhudesai; Lili Chen; Alex Ippoliti; Katerina Fragkiadaki; Hao Liu; Deepak Pathak"),
    _arxiv("2505.24864", "ProRL: Prolonged Reinforcement Learning Expands Reasoning Boundaries in Large Language "
           "Models",
           "Mingjie Liu; Shizhe Diao; Ximing Lu; Jian Hu; Xin Dong; Yejin Choi; Jan Kautz; Yi Dong"),
    _arxiv("2506.13585", "MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention", "MiniMax"),
    _arxiv("2507.05913", "Best-of-N through the Smoothing Lens: KL Divergence and Regret Analysis",
           "Gholamali Aminian; Idan Shenfeld; Amir R. Asadi; Ahmad Beirami; Youssef Mroueh"),
    _arxiv("2507.18071", "Group Sequence Policy Optimization",
           "Chujie Zheng; Shixuan Liu; Mingze Li; Xiong-Hui Chen; Bowen Yu; Chang Gao; others"),
    _arxiv("2509.04372", "Connections between reinforcement learning with feedback, test-time scaling, and diffusion "
           "guidance: An anthology",
           "Yuchen Jiao; Yuxin Chen; Gen Li"),
    _arxiv("2510.01555", "Rethinking KL Regularization in RLHF: From Value Estimation to Gradient Optimization",
           "Kezhao Liu; Jason Klein Liu; Mingtao Chen; Yiming Liu"),
    _arxiv("cs/0507025", "Comparison of Resampling Schemes for Particle Filtering",
           "Randal Douc; Olivier Cappé; Eric Moulines"),
)
_ELSEWHERE = (
    _paper("Rank analysis of incomplete block designs: I. The method of paired comparisons",
           "Ralph Allan Bradley; Milton E. Terry", 1952, venue="Biometrika 39"),
    _paper("Sequential Monte Carlo samplers", "Del Moral, Pierre; Arnaud Doucet; Ajay Jasra", 2006,
           venue="Journal of the Royal Statistical Society: Series B 68"),
    _paper("Solution of a ranking problem from binary comparisons", "Lester R. Ford", 1957,
           venue="The American Mathematical Monthly 64"),
    _paper("Adaptive game playing using multiplicative weights", "Yoav Freund; Robert E. Schapire", 1999,
           venue="Games and Economic Behavior 29"),
    _paper("A class of statistics with asymptotically normal distribution", "Wassily Hoeffding", 1948,
           venue="The Annals of Mathematical Statistics 19"),
    _paper("VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media Text",
           "C. J. Hutto; Eric Gilbert", 2014, venue="ICWSM"),
    _paper("Bandit based Monte-Carlo planning", "Levente Kocsis; Csaba Szepesvári", 2006, venue="ECML"),
    _paper("A simplified two-person poker", "Harold W. Kuhn", 1950, venue="Contributions to the Theory of Games 1"),
    _paper("ROUGE: A Package for Automatic Evaluation of Summaries", "Chin-Yew Lin", 2004,
           venue="Text Summarization Branches Out"),
    _paper("A note on DPO with noisy preferences & relationship to IPO", "Eric Mitchell", 2023,
           venue="https://ericmitchell.ai/cdpo.pdf"),
    _paper("Reinforcement learning by reward-weighted regression for operational space control",
           "Jan Peters; Stefan Schaal", 2007, venue="ICML"),
    _paper("The analysis of permutations", "R. L. Plackett", 1975,
           venue="Journal of the Royal Statistical Society: Series C 24"),
    _paper("Notes on bias in estimation", "M. H. Quenouille", 1956, venue="Biometrika 43"),
    _paper("Approximating KL divergence", "John Schulman", 2020, venue="http://joschu.net/blog/kl-approx.html"),
    _paper("Optimally combining sampling techniques for Monte Carlo rendering", "Eric Veach; Leonidas J. Guibas", 1995,
           venue="SIGGRAPH"),
    _paper("A connection between score matching and denoising autoencoders", "Pascal Vincent", 2011,
           venue="Neural Computation 23"),
    _paper("Simple statistical gradient-following algorithms for connectionist reinforcement learning",
           "Ronald J. Williams", 1992, venue="Machine Learning 8"),
    _paper("A new and efficient estimation method for the generalized Pareto distribution",
           "Jin Zhang; Michael A. Stephens", 2009, venue="Technometrics 51"),
)
# fmt: on

PAPERS: dict[str, Paper] = {paper.arxiv or paper.key: paper for paper in (*_ON_ARXIV, *_ELSEWHERE)}
"""arXiv number, or key where there is none -> the paper."""


def citation(*names: str) -> str:
    """The BibTeX of where methods and kernels come from; without a name, of tiltjax itself.

    A kernel whose docstring and module name no paper is tiltjax's own.

    Args:
      *names: Records ("grpo", one of `tiltjax.train.methods.METHODS`), public functions ("dpo_loss", or
        "losses.preference.dpo_loss" where several modules have one of that name), arXiv numbers ("2305.18290") or other
        keys of `PAPERS`.

    Returns:
      One entry for each paper, in the order in which they are named, with an empty line between two.

    Raises:
      ValueError: If there is no such name, or several modules have it.

    Example:
      >>> print(citation("simpo_loss"))
      @misc{meng2024simpo,
        title = {{SimPO: Simple Preference Optimization with a Reference-Free Reward}},
        author = {Yu Meng and Mengzhou Xia and Danqi Chen},
        year = {2024},
        eprint = {2405.14734},
        archivePrefix = {arXiv},
        url = {https://arxiv.org/abs/2405.14734}
      }
    """
    entries = [entry for name in names for entry in _entries(name)] if names else [_TILTJAX]
    return "\n\n".join(dict.fromkeys(entries))


def _entries(name: str) -> list[str]:
    from tiltjax.train.methods import METHODS

    number = name.removeprefix("arXiv:")
    if number in PAPERS:
        return [PAPERS[number].bibtex()]
    if name in METHODS:
        papers = _cited(METHODS[name].paper)
    else:
        docstring, module_docstring = _docstrings(name)
        papers = _cited(docstring) or _cited(module_docstring)
    return [paper.bibtex() for paper in papers] or [_TILTJAX]


def _docstrings(name: str) -> tuple[str, str]:
    """Of a public function and of its module."""
    prefix, _, function = name.removeprefix("tiltjax.").rpartition(".")
    places = _functions().get(function, {})
    found = [module for module in places if f"{module}.".startswith(f"{prefix}." if prefix else "")]
    if len(found) > 1:
        paths = " or ".join(f"{module}.{function}" for module in found)
        raise ValueError(f"name must say which {function}, {paths}; got {name!r}")
    if not found:
        from tiltjax.ops.checks import did_you_mean
        from tiltjax.train.methods import METHODS

        near = did_you_mean(name, [*METHODS, *_functions(), *PAPERS])
        raise ValueError(f"name must be a method, a public function or an arXiv number of tiltjax; got {name!r}{near}")
    return places[found[0]]


def _cited(text: str) -> list[Paper]:
    """The papers that a text names, in its order."""
    places = {match.start(): PAPERS[match[1]] for match in _ARXIV_ID.finditer(text) if match[1] in PAPERS}
    for paper in _ELSEWHERE:
        if match := re.search(rf"\b{paper.family}\b[^;]*?\b{paper.year}\b", text):
            places[match.start()] = paper
    return [places[place] for place in sorted(places)]


@functools.cache
def _functions() -> dict[str, dict[str, tuple[str, str]]]:
    """Name -> module -> docstrings of the function or class and of the module, read from the source: nothing is run."""
    root = pathlib.Path(__file__).parent
    functions: dict[str, dict[str, tuple[str, str]]] = {}
    for path in sorted(root.rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        parts = path.relative_to(root).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        public = {name for node in tree.body if isinstance(node, ast.Assign) for name in _names(node)}
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in public:
                texts = (ast.get_docstring(node) or "", ast.get_docstring(tree) or "")
                functions.setdefault(node.name, {})[module] = texts
    return functions


def _names(node: ast.Assign) -> list[str]:
    """What ``__all__ = [...]`` lists; nothing for another assignment."""
    if isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__" and isinstance(node.value, ast.List):
        return ast.literal_eval(node.value)
    return []
