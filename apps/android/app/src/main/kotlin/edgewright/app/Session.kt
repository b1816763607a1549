package edgewright.app

import edgewright.Answer
import edgewright.Bench
import edgewright.ContextMemory
import edgewright.EdgewrightException
import edgewright.Event
import edgewright.GenerateOptions
import edgewright.Model
import edgewright.Progress
import edgewright.Traces
import kotlinx.coroutines.CancellationException
import kotlinx.coroutines.CoroutineScope
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.Job
import kotlinx.coroutines.NonCancellable
import kotlinx.coroutines.flow.Flow
import kotlinx.coroutines.flow.MutableStateFlow
import kotlinx.coroutines.flow.StateFlow
import kotlinx.coroutines.flow.asStateFlow
import kotlinx.coroutines.flow.update
import kotlinx.coroutines.launch
import kotlinx.coroutines.withContext
import java.io.File
import java.util.Locale

/** What the screen shows. progress: from 0 to 1, null for none. ready: a model is open. busy: something runs that can be stopped. */
data class Screen(
    val status: String = "",
    val progress: Double? = 0.0,
    val text: String = "",
    val ready: Boolean = false,
    val busy: Boolean = false,
)

/**
 * All that the screen does, without a screen. prepare: what must be there before `open`, which may take long.
 * log: lines for whoever reads along, such as `adb logcat`.
 */
class Session(
    private val scope: CoroutineScope,
    private val prepare: () -> Flow<Progress>,
    private val open: () -> Model,
    private val log: (String) -> Unit = {},
) {
    private val shown = MutableStateFlow(Screen())
    private var model: Model? = null
    private var memory: Pair<String, ContextMemory>? = null
    private var job: Job? = null

    val screen: StateFlow<Screen> = shown.asStateFlow()

    fun start(): Job = work {
        prepare().collect { (done, total) ->
            val here = if (total == 0L) 1.0 else done.toDouble() / total
            shown.update { it.copy(progress = here, status = "${megabytes(done)} of ${megabytes(total)}") }
        }
        shown.update { it.copy(progress = null, status = "opening the model") }
        val opened = withContext(Dispatchers.Default) { open() }
        model = opened
        shown.update { it.copy(ready = true, status = "${opened.app.name}: ${megabytes(opened.app.memoryBytes)}") }
    }

    /** Answers a prompt, behind a context where the model reads one. */
    fun ask(prompt: String, context: String = ""): Job = work {
        val model = opened()
        val behind = memoryOf(model, context)
        append("${if (shown.value.text.isEmpty()) "" else "\n\n"}$prompt\n")
        model.stream(prompt, GenerateOptions(memory = behind)).collect { event ->
            when (event) {
                is Event.Piece -> append(event.text)
                is Event.Done -> shown.update { it.copy(status = summary(event.answer)) }
            }
        }
    }

    /** Rows of tokens a second, to the screen, the log and `into`. */
    fun bench(pp: Int, tg: Int, repeats: Int, into: File, heat: () -> String): Job = work {
        val model = opened()
        into.writeText("| ${model.app.name} | tokens/s |\n|---|---|\n")
        tell("measuring; heat: ${heat()}", into)
        withContext(Dispatchers.Default) { Bench(model, pp, tg, repeats).run { tell(it.toString(), into) } }
        tell("measured; heat: ${heat()}", into)
    }

    /** Whether this phone answers the golden traces as the bundle did. */
    fun check(traces: File): Job = work {
        val model = opened()
        val report = withContext(Dispatchers.Default) { Traces.check(model, traces) }
        report.wrong.forEach { tell(it) }
        tell(report.toString())
    }

    /** Ends what runs. */
    fun stop() {
        job?.cancel()
    }

    /** Ends what runs, then frees the model; `start` opens it again. */
    fun close(): Job {
        stop()
        val running = job
        return scope.launch(NonCancellable) {
            running?.join()
            model?.close()
            model = null
            memory = null
            shown.update { it.copy(ready = false) }
        }
    }

    private fun opened() = model ?: throw EdgewrightException("the model is not open yet; wait for it")

    private suspend fun memoryOf(model: Model, context: String): ContextMemory? {
        if (context.isBlank()) return null
        memory?.let { (text, made) -> if (text == context) return made }
        shown.update { it.copy(status = "reading the context") }
        return withContext(Dispatchers.Default) { model.readContext(context) }.also { memory = context to it }
    }

    /** One piece of work at a time; what goes wrong is its line on the screen. */
    private fun work(act: suspend () -> Unit): Job {
        job?.takeIf { it.isActive }?.let { return it }
        shown.update { it.copy(busy = true) }
        return scope.launch {
            try {
                act()
            } catch (error: CancellationException) {
                shown.update { it.copy(status = "stopped") }
                throw error
            } catch (error: EdgewrightException) {
                log("error: ${error.message}")
                shown.update { it.copy(status = error.message.orEmpty(), progress = null) }
            } finally {
                shown.update { it.copy(busy = false) }
            }
        }.also { job = it }
    }

    private fun append(text: String) = shown.update { it.copy(text = it.text + text) }

    private fun tell(line: String, into: File? = null) {
        log(line)
        into?.appendText("$line\n")
        append("$line\n")
    }

    private fun summary(answer: Answer): String {
        val rate = if (answer.tokens.size > 1) ", ${oneDigit((answer.tokens.size - 1) / answer.seconds)} tokens/s" else ""
        val first = oneDigit(1000 * answer.firstSeconds)
        return "${answer.tokens.size} tokens$rate; first after $first ms; ended by: ${answer.ending.name.lowercase(Locale.ROOT)}"
    }

    private fun oneDigit(value: Double) = String.format(Locale.ROOT, "%.1f", value)

    private fun megabytes(bytes: Long) = "${oneDigit(bytes / 1e6)} MB"
}
