package edgewright

import java.io.File
import kotlin.math.abs

/** What a check of the golden traces found. wrong: a line for each difference. largest: difference of logits. */
class TraceReport(val cases: Int, val texts: Int, val wrong: List<String>, val largest: Double) {
    override fun toString(): String {
        val bad = wrong.map { it.substringBefore(':') }.toSet()
        val badTexts = bad.count { it.startsWith("text") }
        val badCases = bad.map { it.substringBefore(',') }.toSet().count { it.startsWith("trace") }
        return "${cases - badCases} of $cases traces, ${texts - badTexts} of $texts texts; logits differ by at most $largest"
    }
}

/** `traces.json`: what the bundle itself answered. The recorded tokens are fed; another best token by more than the tolerance fails. */
class Traces private constructor(private val file: Fields) {
    private val wrong = mutableListOf<String>()
    private var largest = 0.0

    companion object {
        const val FILE = "traces.json"

        /** Throws EdgewrightException for a file that is none. */
        fun check(model: Model, file: File): TraceReport {
            val traces = Traces(JsonReader.fields(file))
            val cases = traces.file.all("cases")
            val texts = traces.file.all("texts")
            cases.forEachIndexed { number, case -> traces.checkCase(model, case, number) }
            if (model.app.readsText) texts.forEachIndexed { number, case -> traces.checkText(model, case, number) }
            return TraceReport(cases.size, texts.size, traces.wrong, traces.largest)
        }
    }

    private class Step(fields: Fields) {
        val token = fields.int("token")
        val top = fields.list("top").map { (it as List<*>).let { (id, logit) -> (id as Long).toInt() to (logit as Number).toDouble() } }
    }

    private fun checkCase(model: Model, case: Fields, number: Int) {
        val context = case.ints("context")
        val memory = if (context.isEmpty()) null else model.readContext(context)
        val steps = case.all("steps").map(::Step)
        model.start(case.ints("ids"), file.int("new_tokens"), memory).use { stream ->
            var logits = stream.prefill()
            for ((i, step) in steps.withIndex()) {
                step.top.forEach { (id, logit) -> largest = maxOf(largest, abs(logits[id] - logit)) }
                val best = Sampler.best(logits)
                val margin = step.top[0].second - (step.top.find { it.first == best } ?: step.top.last()).second
                if (best != step.token && margin > file.number("tolerance")) {
                    wrong += "trace $number, step $i: token $best, recorded ${step.token} (margin $margin)"
                    return
                }
                if (i + 1 < steps.size) logits = stream.feed(step.token)
            }
        }
        val said = steps.dropLast(if (case.text("ending") == "end") 1 else 0).map { it.token }.toIntArray()
        val text = case.orNull("text") { text(it) } ?: return
        if (model.text(said) != text) wrong += "trace $number: the text is \"${model.text(said)}\", recorded \"$text\""
    }

    private fun checkText(model: Model, case: Fields, number: Int) {
        val text = case.text("text")
        val ids = case.ints("ids")
        val here = model.tokens(text)
        val back = model.text(ids)
        if (!here.contentEquals(ids)) {
            wrong += "text $number: \"$text\" has the tokens ${here.joinToString()}, recorded ${ids.joinToString()}"
        } else if (back != case.text("decoded")) {
            wrong += "text $number: \"$text\" is read back as \"$back\", recorded \"${case.text("decoded")}\""
        }
    }
}
