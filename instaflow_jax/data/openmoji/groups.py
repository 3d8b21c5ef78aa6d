"""The groups of emoji: Unicode's order and subgroups (emoji-test.txt 17.0), with a readable phrase for each subgroup.

The `emoji` package has names but no groups, hence this table. It lists every emoji once in its neutral form;
`subgroup_of` removes skin tones, genders and presentation selectors before the look-up.
"""

import re
from typing import NamedTuple

_TABLE = """
face-smiling; smileys-emotion; a smiling face; a face
  😀 😃 😄 😁 😆 😅 🤣 😂 🙂 🙃 🫠 😉 😊 😇
face-affection; smileys-emotion; a loving face; a face
  🥰 😍 🤩 😘 😗 ☺ 😚 😙 🥲
face-tongue; smileys-emotion; a face with tongue; a face
  😋 😛 😜 🤪 😝 🤑
face-hand; smileys-emotion; a face with a hand; a face
  🤗 🤭 🫢 🫣 🤫 🤔 🫡
face-neutral-skeptical; smileys-emotion; a skeptical face; a face
  🤐 🤨 😐 😑 😶 🫥 😶‍🌫 😏 😒 🙄 😬 😮‍💨 🤥 🫨 🙂‍↔ 🙂‍↕
face-sleepy; smileys-emotion; a sleepy face; a face
  😌 😔 😪 🤤 😴 🫩
face-unwell; smileys-emotion; a sick face; a face
  😷 🤒 🤕 🤢 🤮 🤧 🥵 🥶 🥴 😵 😵‍💫 🤯
face-hat; smileys-emotion; a face with a hat; a face
  🤠 🥳 🥸
face-glasses; smileys-emotion; a face with glasses; a face
  😎 🤓 🧐
face-concerned; smileys-emotion; a worried face; a face
  😕 🫤 😟 🙁 ☹ 😮 😯 😲 😳 🫪 🥺 🥹 😦 😧 😨 😰 😥 😢 😭 😱 😖 😣 😞 😓 😩 😫 🥱
face-negative; smileys-emotion; an angry face; a face
  😤 😡 😠 🤬 😈 👿 💀 ☠
face-costume; smileys-emotion; a creature face; a face
  💩 🤡 👹 👺 👻 👽 👾 🤖
cat-face; smileys-emotion; a cartoon cat; a face
  😺 😸 😹 😻 😼 😽 🙀 😿 😾
monkey-face; smileys-emotion; a monkey; a face
  🙈 🙉 🙊
heart; smileys-emotion; a heart; a feeling
  💌 💘 💝 💖 💗 💓 💞 💕 💟 ❣ 💔 ❤‍🔥 ❤‍🩹 ❤ 🩷 🧡 💛 💚 💙 🩵 💜 🤎 🖤 🩶 🤍
emotion; smileys-emotion; an emotion; a feeling
  💋 💯 💢 🫯 💥 💫 💦 💨 🕳 💬 👁‍🗨 🗨 🗯 💭 💤
hand-fingers-open; people-body; an open hand; a hand
  👋 🤚 🖐 ✋ 🖖 🫱 🫲 🫳 🫴 🫷 🫸
hand-fingers-partial; people-body; a hand sign; a hand
  👌 🤌 🤏 ✌ 🤞 🫰 🤟 🤘 🤙
hand-single-finger; people-body; a pointing hand; a hand
  👈 👉 👆 🖕 👇 ☝ 🫵
hand-fingers-closed; people-body; a closed hand; a hand
  👍 👎 ✊ 👊 🤛 🤜
hands; people-body; a pair of hands; a hand
  👏 🙌 🫶 👐 🤲 🤝 🫱‍🫲 🙏
hand-prop; people-body; a hand holding something; a hand
  ✍ 💅 🤳
body-parts; people-body; a body part; a part of the body
  💪 🦾 🦿 🦵 🦶 👂 🦻 👃 🧠 🫀 🫁 🦷 🦴 👀 👁 👅 👄 🫦
person; people-body; a portrait; a person
  👶 🧒 👦 👧 🧑 👱 👨 🧔 🧑‍🦰 🧑‍🦱 🧑‍🦳 🧑‍🦲 👩 🧓 👴 👵
person-gesture; people-body; a gesturing person; a person
  🙍 🙎 🙅 🙆 💁 🙋 🧏 🙇 🤦 🤷
person-role; people-body; a person at work; a person
  🧑‍⚕ 🧑‍🎓 🧑‍🏫 🧑‍⚖ 🧑‍🌾 🧑‍🍳 🧑‍🔧 🧑‍🏭 🧑‍💼 🧑‍🔬 🧑‍💻 🧑‍🎤 🧑‍🎨 🧑‍✈
  🧑‍🚀 🧑‍🚒 👮 🕵 💂 🥷 👷 🫅 🤴 👸 👳 👲 🧕 🤵 👰 🤰 🫃 🫄 🤱 🧑‍🍼
person-fantasy; people-body; a fantasy person; a person
  👼 🎅 🤶 🧑‍🎄 🦸 🦹 🧙 🧚 🧛 🧜 🧝 🧞 🧟 🧌 🫈
person-activity; people-body; an active person; a person
  💆 💇 🚶 🧍 🧎 🧑‍🦯 🧑‍🦼 🧑‍🦽 🏃 🧑‍🩰 💃 🕺 🕴 👯 🧑‍🐰‍🧑 🧑‍🐰‍👨 🧑‍🐰‍👩 🧖
  🧗
person-sport; people-body; an athlete; a person
  🤺 🏇 ⛷ 🏂 🏌 🏄 🚣 🏊 ⛹ 🏋 🚴 🚵 🤸 🤼 🧑‍🫯‍🧑 🧑‍🫯‍👨 🧑‍🫯‍👩 🤽 🤾 🤹
person-resting; people-body; a resting person; a person
  🧘 🛀 🛌
family; people-body; a family or couple; people
  🧑‍🤝‍🧑 👭 🧑‍🤝‍👩 👫 🧑‍🤝‍👨 👬 💏 🧑‍❤‍💋‍🧑 🧑‍❤‍💋‍👨 🧑‍❤‍💋‍👩 💑
  🧑‍❤‍🧑 🧑‍❤‍👨 🧑‍❤‍👩 🧑‍🧑‍👦 🧑‍🧑‍👧 🧑‍🧑‍👧‍👦 🧑‍🧑‍👦‍👦 🧑‍🧑‍👧‍👧
  🧑‍👦 🧑‍👦‍👦 🧑‍👧 🧑‍👧‍👦 🧑‍👧‍👧
person-symbol; people-body; a symbol of people; people
  🗣 👤 👥 🫂 👪 🧑‍🧑‍🧒 🧑‍🧑‍🧒‍🧒 🧑‍🧒 🧑‍🧒‍🧒 👣 🫆
animal-mammal; animals-nature; a mammal; an animal
  🐵 🐒 🦍 🦧 🐶 🐕 🦮 🐕‍🦺 🐩 🐺 🦊 🦝 🐱 🐈 🐈‍⬛ 🦁 🐯 🐅 🐆 🐴 🫎 🫏 🐎 🦄 🦓 🦌
  🦬 🐮 🐂 🐃 🐄 🐷 🐖 🐗 🐽 🐏 🐑 🐐 🐪 🐫 🦙 🦒 🐘 🦣 🦏 🦛 🐭 🐁 🐀 🐹 🐰 🐇 🐿 🦫
  🦔 🦇 🐻 🐻‍❄ 🐨 🐼 🦥 🦦 🦨 🦘 🦡 🐾
animal-bird; animals-nature; a bird; an animal
  🦃 🐔 🐓 🐣 🐤 🐥 🐦 🐧 🕊 🦅 🦆 🦢 🦉 🦤 🪶 🦩 🦚 🦜 🪽 🐦‍⬛ 🪿 🐦‍🔥
animal-amphibian; animals-nature; an amphibian; an animal
  🐸
animal-reptile; animals-nature; a reptile; an animal
  🐊 🐢 🦎 🐍 🐲 🐉 🦕 🦖
animal-marine; animals-nature; a sea animal; an animal
  🐳 🐋 🐬 🫍 🦭 🐟 🐠 🐡 🦈 🐙 🐚 🪸 🪼 🦀 🦞 🦐 🦑 🦪
animal-bug; animals-nature; a bug; an animal
  🐌 🦋 🐛 🐜 🐝 🪲 🐞 🦗 🪳 🕷 🕸 🦂 🦟 🪰 🪱 🦠
plant-flower; animals-nature; a flower; a plant
  💐 🌸 💮 🪷 🏵 🌹 🥀 🌺 🌻 🌼 🌷 🪻
plant-other; animals-nature; a green plant; a plant
  🌱 🪴 🌲 🌳 🌴 🌵 🌾 🌿 ☘ 🍀 🍁 🍂 🍃 🪹 🪺 🍄 🪾
food-fruit; food-drink; a fruit; food
  🍇 🍈 🍉 🍊 🍋 🍋‍🟩 🍌 🍍 🥭 🍎 🍏 🍐 🍑 🍒 🍓 🫐 🥝 🍅 🫒 🥥
food-vegetable; food-drink; a vegetable; food
  🥑 🍆 🥔 🥕 🌽 🌶 🫑 🥒 🥬 🥦 🧄 🧅 🥜 🫘 🌰 🫚 🫛 🍄‍🟫 🫜
food-prepared; food-drink; a meal; food
  🍞 🥐 🥖 🫓 🥨 🥯 🥞 🧇 🧀 🍖 🍗 🥩 🥓 🍔 🍟 🍕 🌭 🥪 🌮 🌯 🫔 🥙 🧆 🥚 🍳 🥘 🍲 🫕
  🥣 🥗 🍿 🧈 🧂 🥫
food-asian; food-drink; asian food; food
  🍱 🍘 🍙 🍚 🍛 🍜 🍝 🍠 🍢 🍣 🍤 🍥 🥮 🍡 🥟 🥠 🥡
food-sweet; food-drink; a sweet; food
  🍦 🍧 🍨 🍩 🍪 🎂 🍰 🧁 🥧 🍫 🍬 🍭 🍮 🍯
drink; food-drink; a drink; food and drink
  🍼 🥛 ☕ 🫖 🍵 🍶 🍾 🍷 🍸 🍹 🍺 🍻 🥂 🥃 🫗 🥤 🧋 🧃 🧉 🧊
dishware; food-drink; dishware; food and drink
  🥢 🍽 🍴 🥄 🔪 🫙 🏺
place-map; travel-places; a map; a place
  🌍 🌎 🌏 🌐 🗺 🗾 🧭
place-geographic; travel-places; a landscape; a place
  🏔 ⛰ 🛘 🌋 🗻 🏕 🏖 🏜 🏝 🏞
place-building; travel-places; a building; a place
  🏟 🏛 🏗 🧱 🪨 🪵 🛖 🏘 🏚 🏠 🏡 🏢 🏣 🏤 🏥 🏦 🏨 🏩 🏪 🏫 🏬 🏭 🏯 🏰 💒 🗼 🗽
place-religious; travel-places; a place of worship; a place
  ⛪ 🕌 🛕 🕍 ⛩ 🕋
place-other; travel-places; a scene; a place
  ⛲ ⛺ 🌁 🌃 🏙 🌄 🌅 🌆 🌇 🌉 ♨ 🎠 🛝 🎡 🎢 💈 🎪
transport-ground; travel-places; a land vehicle; transport
  🚂 🚃 🚄 🚅 🚆 🚇 🚈 🚉 🚊 🚝 🚞 🚋 🚌 🚍 🚎 🚐 🚑 🚒 🚓 🚔 🚕 🚖 🚗 🚘 🚙 🛻 🚚 🚛
  🚜 🏎 🏍 🛵 🦽 🦼 🛺 🚲 🛴 🛹 🛼 🚏 🛣 🛤 🛢 ⛽ 🛞 🚨 🚥 🚦 🛑 🚧
transport-water; travel-places; a boat; transport
  ⚓ 🛟 ⛵ 🛶 🚤 🛳 ⛴ 🛥 🚢
transport-air; travel-places; an aircraft; transport
  ✈ 🛩 🛫 🛬 🪂 💺 🚁 🚟 🚠 🚡 🛰 🚀 🛸
hotel; travel-places; a hotel thing; travel
  🛎 🧳
time; travel-places; a clock; time
  ⌛ ⏳ ⌚ ⏰ ⏱ ⏲ 🕰 🕛 🕧 🕐 🕜 🕑 🕝 🕒 🕞 🕓 🕟 🕔 🕠 🕕 🕡 🕖 🕢 🕗 🕣 🕘 🕤 🕙
  🕥 🕚 🕦
sky-weather; travel-places; weather and sky; the sky
  🌑 🌒 🌓 🌔 🌕 🌖 🌗 🌘 🌙 🌚 🌛 🌜 🌡 ☀ 🌝 🌞 🪐 ⭐ 🌟 🌠 🌌 ☁ ⛅ ⛈ 🌤 🌥 🌦 🌧
  🌨 🌩 🌪 🌫 🌬 🌀 🌈 🌂 ☂ ☔ ⛱ ⚡ ❄ ☃ ⛄ ☄ 🔥 💧 🌊
event; activities; a celebration; an activity
  🎃 🎄 🎆 🎇 🧨 ✨ 🎈 🎉 🎊 🎋 🎍 🎎 🎏 🎐 🎑 🧧 🎀 🎁 🎗 🎟 🎫
award-medal; activities; a medal; an activity
  🎖 🏆 🏅 🥇 🥈 🥉
sport; activities; a sport; an activity
  ⚽ ⚾ 🥎 🏀 🏐 🏈 🏉 🎾 🥏 🎳 🏏 🏑 🏒 🥍 🏓 🏸 🥊 🥋 🥅 ⛳ ⛸ 🎣 🤿 🎽 🎿 🛷 🥌
game; activities; a game; an activity
  🎯 🪀 🪁 🔫 🎱 🔮 🪄 🎮 🕹 🎰 🎲 🧩 🧸 🪅 🪩 🪆 ♠ ♥ ♦ ♣ ♟ 🃏 🀄 🎴
arts-crafts; activities; arts and crafts; an activity
  🎭 🖼 🎨 🧵 🪡 🧶 🪢
clothing; objects; clothing; an object
  👓 🕶 🥽 🥼 🦺 👔 👕 👖 🧣 🧤 🧥 🧦 👗 👘 🥻 🩱 🩲 🩳 👙 👚 🪭 👛 👜 👝 🛍 🎒 🩴 👞
  👟 🥾 🥿 👠 👡 🩰 👢 🪮 👑 👒 🎩 🎓 🧢 🪖 ⛑ 📿 💄 💍 💎
sound; objects; a sound; an object
  🔇 🔈 🔉 🔊 📢 📣 📯 🔔 🔕
music; objects; music; an object
  🎼 🎵 🎶 🎙 🎚 🎛 🎤 🎧 📻
musical-instrument; objects; a musical instrument; an object
  🎷 🎺 🪊 🪗 🎸 🎹 🎻 🪕 🥁 🪘 🪇 🪈 🪉
phone; objects; a phone; an object
  📱 📲 ☎ 📞 📟 📠
computer; objects; a computer; an object
  🔋 🪫 🔌 💻 🖥 🖨 ⌨ 🖱 🖲 💽 💾 💿 📀 🧮
light-video; objects; a light or camera; an object
  🎥 🎞 📽 🎬 📺 📷 📸 📹 📼 🔍 🔎 🕯 💡 🔦 🏮 🪔
book-paper; objects; a book or paper; an object
  📔 📕 📖 📗 📘 📙 📚 📓 📒 📃 📜 📄 📰 🗞 📑 🔖 🏷
money; objects; money; an object
  🪙 💰 🪎 💴 💵 💶 💷 💸 💳 🧾 💹
mail; objects; mail; an object
  ✉ 📧 📨 📩 📤 📥 📦 📫 📪 📬 📭 📮 🗳
writing; objects; a writing tool; an object
  ✏ ✒ 🖋 🖊 🖌 🖍 📝
office; objects; office supplies; an object
  💼 📁 📂 🗂 📅 📆 🗒 🗓 📇 📈 📉 📊 📋 📌 📍 📎 🖇 📏 📐 ✂ 🗃 🗄 🗑
lock; objects; a lock or key; an object
  🔒 🔓 🔏 🔐 🔑 🗝
tool; objects; a tool; an object
  🔨 🪓 ⛏ ⚒ 🛠 🗡 ⚔ 💣 🪃 🏹 🛡 🪚 🔧 🪛 🔩 ⚙ 🗜 ⚖ 🦯 🔗 ⛓‍💥 ⛓ 🪝 🧰 🧲 🪜 🪏
science; objects; a science instrument; an object
  ⚗ 🧪 🧫 🧬 🔬 🔭 📡
medical; objects; medicine; an object
  💉 🩸 💊 🩹 🩼 🩺 🩻
household; objects; a household item; an object
  🚪 🛗 🪞 🪟 🛏 🛋 🪑 🚽 🪠 🚿 🛁 🪤 🪒 🧴 🧷 🧹 🧺 🧻 🪣 🧼 🫧 🪥 🧽 🧯 🛒
other-object; objects; another object; an object
  🚬 ⚰ 🪦 ⚱ 🧿 🪬 🗿 🪧 🪪
transport-sign; symbols; a public sign; a sign
  🏧 🚮 🚰 ♿ 🚹 🚺 🚻 🚼 🚾 🛂 🛃 🛄 🛅
warning; symbols; a warning sign; a sign
  ⚠ 🚸 ⛔ 🚫 🚳 🚭 🚯 🚱 🚷 📵 🔞 ☢ ☣
arrow; symbols; an arrow; a symbol
  ⬆ ↗ ➡ ↘ ⬇ ↙ ⬅ ↖ ↕ ↔ ↩ ↪ ⤴ ⤵ 🔃 🔄 🔙 🔚 🔛 🔜 🔝
religion; symbols; a religious symbol; a symbol
  🛐 ⚛ 🕉 ✡ ☸ ☯ ✝ ☦ ☪ ☮ 🕎 🔯 🪯
zodiac; symbols; a zodiac sign; a symbol
  ♈ ♉ ♊ ♋ ♌ ♍ ♎ ♏ ♐ ♑ ♒ ♓ ⛎
av-symbol; symbols; a media button; a symbol
  🔀 🔁 🔂 ▶ ⏩ ⏭ ⏯ ◀ ⏪ ⏮ 🔼 ⏫ 🔽 ⏬ ⏸ ⏹ ⏺ ⏏ 🎦 🔅 🔆 📶 🛜 📳 📴
gender; symbols; a gender sign; a symbol
  ♀ ♂ ⚧
math; symbols; a math sign; a symbol
  ✖ ➕ ➖ ➗ 🟰 ♾
punctuation; symbols; a punctuation mark; a symbol
  ‼ ⁉ ❓ ❔ ❕ ❗ 〰
currency; symbols; a currency sign; a symbol
  💱 💲
other-symbol; symbols; another symbol; a symbol
  ⚕ ♻ ⚜ 🔱 📛 🔰 ⭕ ✅ ☑ ✔ ❌ ❎ ➰ ➿ 〽 ✳ ✴ ❇ © ® ™ 🫟
keycap; symbols; a keycap; a symbol
  🔟
alphanum; symbols; letters on a button; a symbol
  🔠 🔡 🔢 🔣 🔤 🅰 🆎 🅱 🆑 🆒 🆓 ℹ 🆔 Ⓜ 🆕 🆖 🅾 🆗 🅿 🆘 🆙 🆚 🈁 🈂 🈷 🈶 🈯 🉐
  🈹 🈚 🈲 🉑 🈸 🈴 🈳 ㊗ ㊙ 🈺 🈵
geometric; symbols; a shape; a symbol
  🔴 🟠 🟡 🟢 🔵 🟣 🟤 ⚫ ⚪ 🟥 🟧 🟨 🟩 🟦 🟪 🟫 ⬛ ⬜ ◼ ◻ ◾ ◽ ▪ ▫ 🔶 🔷 🔸 🔹
  🔺 🔻 💠 🔘 🔳 🔲
flag; flags; a special flag; a flag
  🏁 🚩 🎌 🏴 🏳 🏳‍🌈 🏳‍⚧ 🏴‍☠
country-flag; flags; a flag of a country; a flag
subdivision-flag; flags; a flag of a region; a flag
"""

_INVISIBLE = re.compile("[\ufe0f\U0001f3fb-\U0001f3ff]")
_FLAG = re.compile("[\U0001f1e6-\U0001f1ff]{2}")


class Subgroup(NamedTuple):
    """A row of the table: `phrase` describes the subgroup ("a smiling face"), `kind` several subgroups ("a face")."""

    name: str
    group: str
    phrase: str
    kind: str


def _parse(table: str) -> tuple[dict[str, Subgroup], dict[str, Subgroup]]:
    """Header lines name a subgroup; the indented lines below hold its emoji."""
    subgroups, members = {}, {}
    for line in table.strip().splitlines():
        if not line.startswith("  "):
            row = Subgroup(*line.split("; "))
            subgroups[row.name] = row
        else:
            members.update(dict.fromkeys(line.split(), row))
    return subgroups, members


SUBGROUPS, _MEMBERS = _parse(_TABLE)


def subgroup_of(symbol: str) -> Subgroup:
    """The subgroup of an emoji of any tone or gender.

    Raises:
      KeyError: the emoji is newer than the table.
    """
    plain = _INVISIBLE.sub("", symbol)
    if _FLAG.fullmatch(plain):
        return SUBGROUPS["country-flag"]
    if plain.endswith("\U000e007f"):
        return SUBGROUPS["subdivision-flag"]
    if plain.endswith("\u20e3"):
        return SUBGROUPS["keycap"]
    return _MEMBERS.get(plain) or _MEMBERS[_neutral(plain)]


def _neutral(plain: str) -> str:
    """The genderless form: without gender sign and direction, "man" and "woman" in sequences replaced by "person"."""
    plain = re.sub("\u200d[\u2640\u2642\u27a1]", "", plain)
    return re.sub("[\U0001f468\U0001f469](?=\u200d)", "\U0001f9d1", plain)
