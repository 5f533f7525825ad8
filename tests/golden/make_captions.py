"""Scores the sentences below with the reference implementation and writes `captions.json` beside this file.

    python tests/golden/make_captions.py      needs pip install pycocoevalcap, and a Java

Each block is one image: its first line the candidate, the others the references. The sentences were written for this
file: half of them ordinary captions, half of them what trips tokenisers up.
"""

from __future__ import annotations

import json
from pathlib import Path

BLOCKS = """
A brown dog runs along a beach with a stick in its mouth.
A dog carries a stick while running on the sand.
A wet brown dog is running beside the sea.
The dog has found a stick on the beach.
A large dog running across a sandy beach

Two children are sitting on a wooden bench eating ice cream.
Two kids eat ice cream on a bench.
A boy and a girl sitting on a bench with ice cream cones.
A pair of children enjoying ice cream in the park
Small children on a wooden bench with melting ice cream.

A man riding a red bicycle down a narrow street.
A cyclist on a red bike passes through a narrow alley.
The man rides his bicycle between old houses.
A person on a bike in a narrow street of an old town.
A man on a bicycle wearing a red helmet.

A plate of food with rice, beans and a fried egg on top.
A plate with rice, black beans, and a fried egg.
Breakfast plate of eggs and beans on a white table
A fried egg sits on top of rice and beans.
A close up of a plate of food on a table.

A group of people standing around a kitchen preparing dinner.
Several people are cooking together in a small kitchen.
Friends prepare a meal in a crowded kitchen.
People stand around a kitchen counter full of vegetables.
A group of adults cooking dinner and talking

A yellow train is pulling into a station.
A yellow train arrives at the platform.
The commuter train stops at an empty station
A train on the tracks next to a platform with a clock.
A bright yellow train at a train station.

A cat is sleeping on top of a laptop computer.
A grey cat asleep on the keyboard of a laptop.
The cat lies on a computer.
A cat curled up on a laptop on a desk
A sleepy cat rests its head on the warm keyboard.

A woman in a blue coat is holding an umbrella in the rain.
A lady walks through the rain with a black umbrella.
A woman wearing a blue coat under an umbrella.
A woman stands at a crossing on a rainy day with an umbrella
A rainy street and a woman in blue.

An elephant is drinking water from a muddy pond.
An elephant drinks at a watering hole.
A lone elephant standing in a pond of muddy water.
The elephant sprays water over its back.
A big elephant near some water and a few trees

A surfer rides a tall wave near the rocks.
A man surfing on a big wave.
A surfer in a black wetsuit riding a wave in the ocean
The wave breaks over a surfer close to the rocks.
Someone is surfing in rough water.

a man a man a man is standing next to a a tree
A man stands next to a tree.
A man leaning on an old oak tree.
A tall man beside a tree in a field
There is a man near the tree.

Flowers in a vase
A glass vase filled with yellow flowers on a window sill.
Yellow tulips in a vase.
Some flowers in a clear vase near a window
A vase of tulips stands in the sun.

A street sign that says St. James St. in front of a church.
The sign on the corner reads "St. James St." in white letters.
Mr. and Mrs. Hill pose in front of St. James church.
A sign for Dr. Webb's office hangs next to a church on Main St.
Signs at the corner of Oak Ave. and St. James Blvd. in town

A truck from Miller & Sons Inc. is parked near the U.S. flag.
An Inc. and a Co. painted on the side of a U.S. mail truck.
A U.S.A. flag flies over the truck of Miller Bros. and Co.
A Ltd. company's van with a U.K. number plate.
The truck (Miller & Sons, Inc.) stands at 12 Elm Rd.

A clock on a tower shows 5:30 p.m. on a cloudy day.
The clock reads 5:30 and the sky is grey.
It is 5:30 p.m. according to the clock tower.
A clock tower at 5:30pm, with Roman numerals
A church clock showing half past 5 in the evening; it's 17:30.

A boy in his No. 7 shirt kicks a ball.
A soccer player, no. 7, is about to kick the ball.
Player No. 10 and player no. 7 run for the ball. No one is near.
The player with number 7 on the shirt says no.
A kid wearing a #7 jersey on a soccer field

Three men are sitting in a T.V. studio, e.g. for an interview.
Men in suits sit in a TV studio, i.e. a room with cameras.
A T.V. set, cameras, lights, etc. in a studio
An interview on a t.v. set. Two of the men are laughing.
Prof. Lane, Sgt. Cole and Gen. Ross talk on TV.

The box holds 1,000 nails and costs $4.99 at the store.
A box of 1,000 nails for $4.99.
A sale sign: 50% off, now $2.50, was $5.00
A price tag of £3 next to one of €4 and one of 99¢.
A box with nails on sale for US$5, 10% off

There are 2 1/2 pizzas on the table and 3/4 of a cake.
Two and a half pizzas and 3/4 of a cake.
A table with 2 1/2 pizzas, 1/2 a pie and drinks
About ½ of the pizza is gone, and ¼ of the cake.
A 1/2 eaten pizza on a 12-inch plate

A photo from 12/25/2013 of a tree with 100 lights.
A Christmas tree photographed on 12-25-2013 at 10:15am.
A 1950s style tree in a room from the '50s
The tree of 2013 is 2.5 times as tall as the one of 1990.
An image taken in the 1990s, probably 1995/96

Call 555-0123 for a ride, says the sign on the 4x4.
A 4x4 truck with a phone number, 555-0123, on its door.
A sign with (555) 010-0199 on the side of a car
The 3rd car in line is a 4-door with 4WD.
A number 9.5 is painted on the 2nd door of the car.

A sign reads "No Parking" in red letters.
A "no parking" sign on a brick wall.
The words 'No Parking' are painted on a wall
A wall with a sign that says “No Parking” and a ‘tow away’ sticker.
"No parking," says the sign, "at any time."

A man's hat is on the dogs' bed and the dog isn't happy.
The dog doesn't like the man's hat on its bed.
It's a hat that's lying on a dog's bed
The dogs' beds aren't big enough; they're full of hats.
A dog who can't sleep because there's a hat on his bed.

They're playing rock 'n' roll at eight o'clock.
A rock'n'roll band won't stop until 12 o'clock.
We've seen a band that'd play all night, y'all.
A band playing rock & roll, don't you know
The singer’s guitar isn’t plugged in, and he’s singing.

I'm gonna guess that he cannot swim, 'cause he wears a life vest.
He can't swim so he's got to wear a vest. I wanna help.
A kid who's gotta wear a vest, and she'll watch him
Gimme that vest, 'tis mine. Lemme go.
Someone who cannot swim; he'd better wear a vest.

A well-dressed man with a half-eaten hot-dog and a T-shirt.
A half-eaten hot dog in the hand of a man in a t-shirt.
A state-of-the-art, black-and-white t-shirt
A man in a short-sleeved T-shirt -- with a tie -- eats.
A well dressed man - he eats a hot-dog - near a mid-size car

A black/white cat and/or its brother sits w/ a toy.
A black and white cat with a toy mouse/ball.
A cat/dog toy w/o a cat in a black/white room
The cat is on the chair/couch and plays with a string.
Cats, black/white/grey, sleeping 24/7

Wait... what is that dog doing up there?
A dog on a roof... how did it get there?
A dog is standing on a roof … looking down
What?! A dog on the roof!! Is it safe??
The dog. It is on the roof. It looks around....

A red bus (number 12) stops near a sign [closed].
A bus (red) at a bus stop.
A double-decker bus {red} with an ad (for tea) on its side
The bus [no. 12] has stopped (again) in front of the café.
A red bus ((with people)) near a closed shop

A slice of pie. his hat is on the table.
A pie on a table. A hat is next to it.
The hat lies beside a slice of pie.The cup is empty.
A slice of pie,a fork ,and a hat
There is pie. And cake. And a cup of tea.

A café with a piñata and a naïve painting of a fiancée.
A cafe that sells crème brûlée and jalapeño bread.
A painting of a girl in a café in Zürich
The Ångström café's window, with a bouquet à la carte.
A señora and her niño near a jukebox

A happy dog 😀 with a ball ⚽ in the park.
A dog ❤ its ball. :-) So cute!
A happy dog in the park :) playing fetch 🐕
A smiling dog ;) and its red ball =D
Dog + ball = fun!!!

The cat's toy is 50% off @ the shop & it's cute.
A pet shop: toys @ $3 & food @ $7.
A cat toy & a dog toy for sale * today only *
Visit www.petshop.com or mail cats@petshop.com for toys.
A shop with a http://petshop.com/toys sticker and a #sale tag on its door

A fast food sign from AT&T and the R&B club, Q&A at 8.
The M&M candies are next to an AT&T phone.
An R&B band at the A&W stand – a drive-in
A club — with a B&B upstairs — at night
A sign for rock&roll, R&B and drum&bass

A person with a 6'2" surfboard and a 5' paddle.
A 6 ft. surfboard that weighs 12 lbs. and a paddle.
A 6'2" board leaning on a wall, 2 in. from the door
The surfboard is 6ft 2in long. It is blue.
A tall man, 6'2", with his board

The letter K. is painted on plan B. of the wall.
A wall with the letters A, B and C.
A big K on a wall near exit B.
A J.K. Rowling book lies near a box marked D.J. and M.D.
An x-ray of a hand on a wall; type A. The hand is small.

一只狗在沙滩上跑
A sign with the words 出口 and EXIT above a door.
An exit sign in 中文 and English
كلب يركض على الشاطئ
Собака бежит по пляжу.

A dog's life's good, isn't it? It'll be o.k. by 9 a.m.
The dog's dog's bone is o.k.
It'll rain at 9 a.m. or 10 A.M. tomorrow
A dog that shouldn't've jumped over ma'am's fence.
She said: "It's 9 o'clock," and left.

A white bowl; a spoon: both are empty - so is the cup.
An empty bowl, a spoon; a cup.
Bowls: white, blue, grey (and 2 red)
A spoon is in the bowl;the cup is next to it:empty.
White bowl , silver spoon , and a cup .

<unk> man with a <unk> on his head
A man with a basket on his head.
A man carries bread > fruit in a basket & walks
A man <with a basket> in a market
The man &amp; his basket are at the market.

A foo.jpg label is printed on the bottom of photo_12.png.
A photo with its file name, IMG_0042.jpg, printed on it.
The image named my-cat.png shows a cat
A file called notes.txt, version 2.0, on a screen
A computer screen with a C++ program, a C# book and vim.

A
A white page.
A completely white image with nothing on it.
An empty page

A kite flies over a field with people watching
A kite with a long tail flies above a green field.
People are flying kites in a park on a windy day.
Several kites in the sky over the beach
A man flying a kite with two boys.
A colourful kite, high in the sky, seen from below.
"""


def images() -> tuple[dict[str, list[str]], dict[str, str]]:
    """The blocks as references and candidates, by a number for each image."""
    references, candidates = {}, {}
    for i, block in enumerate(BLOCKS.strip().split("\n\n")):
        first, *others = block.split("\n")
        references[str(i)], candidates[str(i)] = others, first
    return references, candidates


def main() -> None:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    references, candidates = images()
    tokenize = PTBTokenizer().tokenize
    true = tokenize({image: [{"caption": caption} for caption in group] for image, group in references.items()})
    written = tokenize({image: [{"caption": caption}] for image, caption in candidates.items()})
    scores: dict[str, float] = {}
    per_image: dict[str, list[float]] = {}
    for name, scorer in (("Bleu", Bleu(4)), ("METEOR", Meteor()), ("ROUGE_L", Rouge()), ("CIDEr", Cider())):
        score, each = scorer.compute_score(true, written)
        if name == "Bleu":
            scores |= {f"Bleu_{k + 1}": value for k, value in enumerate(score)}
            per_image |= {f"Bleu_{k + 1}": list(values) for k, values in enumerate(each)}
        else:
            scores[name], per_image[name] = float(score), [float(value) for value in each]
    golden = {
        "made_with": "pycocoevalcap (PTB tokenizer 3.4.1, METEOR 1.5) by make_captions.py",
        "references": references,
        "candidates": candidates,
        "tokens": {image: {"references": true[image], "candidate": written[image][0]} for image in references},
        "scores": scores,
        "per_image": per_image,
    }
    path = Path(__file__).with_name("captions.json")
    path.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
