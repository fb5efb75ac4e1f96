"""The geometry, without any language model: which cities would the best policy recommend?

    python data/results/cities.py      # writes cities.csv and cities.png here, 12 s on one core

A policy p over 100 answers ("I recommend visiting Lisbon, Portugal.") has no quality to care for,
only diversity. Draw k = 4 iid answers, with unit-norm embeddings phi and cosines L (over all cities
here), and maximise over p

    pairwise   the expected cosine distance   1 - E<phi, phi'>    =  1 - p'Lp  =  1 - ||E phi||^2
    squared    the same, cosines squared      1 - E<phi, phi'>^2  =  1 - ||Sigma||^2
    volume     the expected log-volume        E log det(L_{y1..y4} + I)

with Sigma = E phi phi'. All are exact: for the volume all 100^4 groups are enumerated, as pairs of
pairs. All are concave in p, so what is found is the best of all policies. (Elementwise powers of a
Gram matrix are Gram matrices, Schur. Volume: given the others of the group, two answers i and j are
worth a_i + a_j + log(1 - R_ij^2), with some Gram matrix R, and log(1 - R^2) = -sum_m R^(2m)/m.) The
CSV also holds, from the D-optimality identity, another exact route to the same groups,

    log E det(L + I) = log sum_{j=0..k} C(k, j) j! e_j(eigenvalues of Sigma)

The distance is linear in the cosine: only the outermost answers are worth giving. The volume counts
squares, k log 2 - sum_{i<j} L_ij^2 / 4 + ...: a somewhat similar answer costs little. In miniature,
three answers in the plane at 0, 60 and 120 degrees: pairwise 1/2, 0, 1/2; the others 1/3 each.

NOTE  This re-creates the geometry of the paper's city experiment, not the experiment, in which a
language model is trained.
"""

import csv
import math
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))
from dqo import embed, gram, load_encoder

TEMPLATES = [
    "{city}",
    "{city}, {country}",
    "I recommend visiting {city}.",
    "The city of {city} in {country} is worth a journey.",
    "I recommend visiting {city}, {country}.",  # in the picture
]
CITIES = """\
Europe: Lisbon, Portugal; Madrid, Spain; Paris, France; London, England; Dublin, Ireland;
Edinburgh, Scotland; Amsterdam, Netherlands; Brussels, Belgium; Berlin, Germany; Zurich,
Switzerland; Vienna, Austria; Prague, Czech Republic; Budapest, Hungary; Warsaw, Poland; Rome,
Italy; Venice, Italy; Athens, Greece; Istanbul, Turkey; Bucharest, Romania; Kyiv, Ukraine; Moscow,
Russia; Stockholm, Sweden; Helsinki, Finland; Reykjavik, Iceland

Asia: Tokyo, Japan; Kyoto, Japan; Seoul, South Korea; Beijing, China; Shanghai, China; Hong Kong,
China; Taipei, Taiwan; Ulaanbaatar, Mongolia; Manila, Philippines; Hanoi, Vietnam; Bangkok,
Thailand; Kuala Lumpur, Malaysia; Singapore, Singapore; Jakarta, Indonesia; Yangon, Myanmar; Dhaka,
Bangladesh; Mumbai, India; Delhi, India; Colombo, Sri Lanka; Kathmandu, Nepal; Karachi, Pakistan;
Tashkent, Uzbekistan; Tehran, Iran; Dubai, United Arab Emirates; Jerusalem, Israel

Africa: Cairo, Egypt; Tunis, Tunisia; Algiers, Algeria; Marrakesh, Morocco; Dakar, Senegal; Bamako,
Mali; Accra, Ghana; Lagos, Nigeria; Kinshasa, Congo; Addis Ababa, Ethiopia; Kampala, Uganda;
Nairobi, Kenya; Dar es Salaam, Tanzania; Lusaka, Zambia; Windhoek, Namibia; Cape Town, South
Africa; Antananarivo, Madagascar

North America: New York, United States; Miami, United States; Chicago, United States; New Orleans,
United States; Denver, United States; San Francisco, United States; Anchorage, United States;
Honolulu, United States; Toronto, Canada; Vancouver, Canada; Mexico City, Mexico; Guatemala City,
Guatemala; Panama City, Panama; Havana, Cuba; Kingston, Jamaica

South America: Bogota, Colombia; Caracas, Venezuela; Quito, Ecuador; Lima, Peru; Cusco, Peru; La
Paz, Bolivia; Santiago, Chile; Buenos Aires, Argentina; Montevideo, Uruguay; Rio de Janeiro,
Brazil; Manaus, Brazil

Oceania: Sydney, Australia; Melbourne, Australia; Perth, Australia; Darwin, Australia; Auckland,
New Zealand; Wellington, New Zealand; Suva, Fiji; Port Moresby, Papua New Guinea"""
PLACES = []  # (city, country, continent): capitals and other well-known ones
for part in CITIES.split("\n\n"):
    continent, places = " ".join(part.split()).split(": ")
    PLACES += [(*place.split(", "), continent) for place in places.split("; ")]


# ---- the best policies
def maximise_quadratic(H, b, p, tolerance=1e-9):
    """The p on the simplex that maximises p'Hp/2 + b'p, concave on it.    H: (n, n);  b, p: (n,)

    Moves probability from the city with the smallest derivative to the one with the largest, as
    much as pays off, until all in use have the same derivative and no other has a larger one.
    NOTE  Logits of a softmax would not do: their gradient vanishes where a city is nearly out."""
    p, slope = p.clone(), H @ p + b  # (n,) (n,)
    for _ in range(100_000):  # some hundreds are usual
        up = slope.argmax()
        down = slope.where(p > 0, slope.new_tensor(math.inf)).argmin()
        if slope[up] - slope[down] < tolerance:
            return p
        curvature = 2 * H[up, down] - H[up, up] - H[down, down]
        step = torch.minimum((slope[up] - slope[down]) / curvature, p[down])
        p[up] += step
        p[down] -= step  # an exact 0 if all of it goes
        slope += step * (H[:, up] - H[:, down])
    raise RuntimeError("no maximum found: is the quadratic concave?")


def volume_table(L):
    """log det(L + I) of every group of four: (n, n) -> (m, m), m = n(n+1)/2, a row and a column
    per unordered pair of cities.

    det of (a, b, c, d) = det of (a, b) * det of (c, d) in the kernel S that is left of L once a
    and b are given (Schur)."""
    n = len(L)
    first, second = torch.triu_indices(n, n)  # (m,) (m,) (0,0) (0,1) .. (1,1) (1,2) ..
    rows = []
    for a in range(n):  # and with it each b from a on: n-a pairs
        A = torch.stack([L[a, a].expand(n - a), L[a, a:], L[a, a:], L.diagonal()[a:]], 1)
        A = A.view(-1, 2, 2) + torch.eye(2).to(L)  # (n-a, 2, 2)
        X = torch.stack([L[a].expand(n - a, n), L[a:]], 1)  # (n-a, 2, n)
        S = L - X.mT @ torch.linalg.solve(A, X)  # (n-a, n, n)
        one = 1 + S.diagonal(dim1=1, dim2=2)  # (n-a, n)
        two = one[:, first] * one[:, second] - S[:, first, second] ** 2  # (n-a, m)
        rows.append(two.log() + torch.logdet(A)[:, None])
    return torch.cat(rows)  # (m, m)


def expected_log_det(table, p):
    """E log det(L + I) of four draws from p, and V, (n, n), the same given the first two of them.
    V is all that an optimiser needs: value p'Vp, gradient 4 Vp, Hessian 12 V."""
    n = len(p)
    first, second = torch.triu_indices(n, n)
    orders = 2 - (first == second).to(p)  # (m,)
    pair = p[first] * p[second] * orders  # (m,) the chance of each pair, in any order
    V = p.new_empty(n, n)
    V[first, second] = V[second, first] = table @ pair
    return p @ V @ p, V


def most_distant(L):
    """The p that maximises 1 - p'Lp."""
    uniform = torch.full_like(L[0], 1 / len(L))
    return maximise_quadratic(-2 * L, torch.zeros_like(L[0]), uniform)


def most_volume(table, p, tolerance=1e-8):
    """Newton's method on the simplex: maximise the quadratic model at p, move there, repeat."""
    for _ in range(50):
        V = expected_log_det(table, p)[1]
        if gap(4 * V @ p, p) < tolerance:
            return p
        p = maximise_quadratic(12 * V, -8 * V @ p, p)  # gradient at q: 4 Vp + 12 V (q - p)
    raise RuntimeError("no maximum found: Newton's method does not converge")


def gap(slope, p):
    """The most that a concave objective can gain, by its slope at p."""
    return (slope.max() - slope @ p).item()


# ---- what they are like
def spectrum_of(L, p):
    """(n,) the eigenvalues of Sigma, sum 1, and zeros."""
    return torch.linalg.eigvalsh(p.sqrt()[:, None] * L * p.sqrt())


def log_expected_det(L, p, k=4):
    """log E det(L + I) of k draws by the D-optimality identity.

    e_j: the coefficients of prod_i (1 + eigenvalue_i x)."""
    e = torch.eye(1, k + 1, dtype=p.dtype)[0]  # (k+1,) [1 0 0 ..]
    for x in spectrum_of(L, p):
        e = e + x * torch.cat([e.new_zeros(1), e[:-1]])
    terms = [math.comb(k, j) * math.factorial(j) * e[j].item() for j in range(k + 1)]
    return math.log(sum(terms))


def effective(weights):
    """The effective number of weights with sum 1: exp(entropy)."""
    return torch.special.entr(weights.clamp(min=0)).sum().exp().item()


def measure(L, table, p):
    """Most of a row of the CSV; `vendi`: of endless answers."""
    s2, s3, s4 = ((p ** m).sum().item() for m in (2, 3, 4))
    return dict(
        cities_above_1_percent=int((p > 0.01).sum()),
        effective_cities=effective(p),
        vendi=effective(spectrum_of(L, p)),
        four_all_different=1 - 6 * s2 + 8 * s3 + 3 * s2 ** 2 - 6 * s4,  # 4! e_4(p)
        distance=1 - (p @ L @ p).item(),
        log_det=expected_log_det(table, p)[0].item(),
        log_expected_det=log_expected_det(L, p),
    )


# ---- the picture
CONTINENTS = dict.fromkeys(continent for _, _, continent in PLACES)
COLORS = dict(zip(CONTINENTS, "#1f5fa8 #c45a00 #1f7a1f #b3202a #6b3fa0 #6b5b4b".split()))
DISC = 5000  # area of a disc of probability 1, in points squared
# where a name can stand, seen from its point
SIDES = [(.7, .7), (-.7, .7), (.7, -.7), (-.7, -.7), (0, -1), (0, 1), (-1, 0), (1, 0)]


def name_points(axes, points, size=9, gaps=(2,), sides=SIDES):
    """Names beside points, where they hide no other point or name; if that is nowhere, none.

    points: [(x, y, radius, name, color)], radius and gaps in points of print"""
    from matplotlib.patheffects import withStroke
    from matplotlib.transforms import Bbox
    axes.figure.draw_without_rendering()  # places are known only now
    scale, taken = axes.figure.dpi / 72, []
    for x, y, radius, *_ in points:
        (px, py), r = axes.transData.transform((x, y)), 0.75 * radius * scale
        taken.append(Bbox.from_extents(px - r, py - r, px + r, py + r))
    halo = [withStroke(linewidth=2.5, foreground="white")]
    for x, y, radius, name, color in points:
        for gap, (dx, dy) in [(gap, side) for gap in gaps for side in sides if name]:
            where = dict(xy=(x, y), xytext=(dx * (radius + gap), dy * (radius + gap)),
                         textcoords="offset points")
            text = axes.annotate(
                name, **where, color=color, fontsize=size, path_effects=halo,
                ha=("center", "left", "right")[(dx > 0) - (dx < 0)],
                va=("center", "bottom", "top")[(dy > 0) - (dy < 0)])
            box = text.get_window_extent()
            if axes.bbox.x0 < box.x0 and box.x1 < axes.bbox.x1 and not box.count_overlaps(taken):
                taken.append(box)
                if gap > gaps[0]:
                    axes.annotate("", **where, arrowprops=dict(arrowstyle="-", color=color, lw=0.5))
                break
            text.remove()


def in_the_plane(phi):
    """(n, 2), the first two principal components, and their share of the variance."""
    centred = phi - phi.mean(0)  # (n, D)
    axes = torch.linalg.svd(centred, full_matrices=False)[2][:2]  # (2, D)
    axes = axes * axes.sum(1, keepdim=True).sign()  # an SVD leaves the signs open
    plane = centred @ axes.T  # (n, 2)
    return plane, (plane ** 2).sum() / (centred ** 2).sum()


def plot(phi, policies, path):
    """The cities in the plane of their first two principal components, the probability of each as
    the area of a disc. policies: {title: p}"""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    plane, share = in_the_plane(phi)
    colors = [COLORS[continent] for _, _, continent in PLACES]
    figure = Figure(figsize=(10, 5.3))
    both = figure.subplots(1, 2, sharex=True, sharey=True)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.9, bottom=0.1, wspace=0.02)
    for axes, (title, p) in zip(both, policies.items()):
        axes.scatter(*plane.T, s=3, c=colors, alpha=0.6)
        axes.scatter(*plane.T, s=DISC * p, c=colors, alpha=0.5, lw=0)
        axes.set_title(title, fontsize=11)
        axes.set(xticks=[], yticks=[])
        axes.margins(0.08)
    handles = [Line2D([], [], ls="", marker="o", color=color, label=continent)
               for continent, color in COLORS.items()]
    figure.legend(handles=handles, loc="lower center", ncols=6, frameon=False, handletextpad=0.1,
                  columnspacing=1.2, bbox_to_anchor=(0.5, 0.03))
    note = ("disc area: probability; position: first two principal components, "
            f"{100 * share:.0f} % of the variance")
    figure.text(0.5, 0.015, note, ha="center", fontsize=9, color="0.35")
    for axes, p in zip(both, policies.values()):
        radius, order = (DISC * p / math.pi).sqrt().tolist(), p.argsort(descending=True).tolist()
        name_points(axes, [(*plane[i].tolist(), radius[i], p[i] > 0.02 and PLACES[i][0], colors[i])
                           for i in order if p[i] > 0.005], sides=SIDES[::-1])
    figure.savefig(path, dpi=170)


# ---- rows
def optimise(L, table):
    """{objective: (best policy, derivatives of the objective there)}"""
    uniform = torch.full_like(L[0], 1 / len(L))
    distant, squared = most_distant(L), most_distant(L ** 2)
    volume = most_volume(table, uniform)
    return {
        "uniform": (uniform, None),  # maximises nothing
        "pairwise": (distant, -2 * L @ distant),
        "squared": (squared, -2 * L ** 2 @ squared),
        "volume": (volume, 4 * expected_log_det(table, volume)[1] @ volume),
    }


def csv_row(template, objective, measured, p, slope):
    row = dict(template=template, objective=objective, **measured, gap_at_most="", top="")
    if slope is not None:
        largest = p.argsort(descending=True)[:10]
        row["gap_at_most"] = f"{gap(slope, p):.0e}"
        row["top"] = "; ".join(f"{PLACES[i][0]} {100 * p[i]:.1f} %" for i in largest)
    return row


def write(name, rows):
    """rows: dicts of texts and numbers"""
    with open(HERE / name, "w", newline="", encoding="utf-8") as file:
        out = csv.DictWriter(file, rows[0], lineterminator="\n")
        out.writeheader()
        for row in rows:
            out.writerow({k: f"{x:.4f}" if isinstance(x, float) else x for k, x in row.items()})


def main():
    torch.set_num_threads(1)  # the same digits on any number of cores, and no slower
    encoder, rows = load_encoder(), []
    for template in TEMPLATES:
        texts = [template.format(city=city, country=country) for city, country, _ in PLACES]
        phi = embed(encoder, texts).double()  # (n, D)
        L = gram(phi)  # (n, n)
        table = volume_table(L)
        best = optimise(L, table)
        rows += [csv_row(template, objective, measure(L, table, p), p, slope)
                 for objective, (p, slope) in best.items()]
    write("cities.csv", rows)
    _, pairwise, _, volume = rows[-4:]  # those of the last template
    title = "{}\n{cities_above_1_percent} cities above 1 %, effective number {effective_cities:.1f}"
    plot(phi, {
        title.format("the largest pairwise distance", **pairwise): best["pairwise"][0],
        title.format("the largest volume, log det(L + I)", **volume): best["volume"][0],
    }, HERE / "cities.png")


if __name__ == "__main__":
    main()
